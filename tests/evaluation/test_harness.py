import numpy as np
import pytest
import torch
from torch.nn import functional as F

from k2.config.model import ModelConfig
from k2.data.tokenizer import Tokenizer
from k2.errors import UserError
from k2.evaluation.harness import Score, answer_text, encode_prompt, evaluate, evaluate_mixture, heldout_loss
from k2.evaluation.tasks import get_task, split_seed
from k2.model.generate import Engine
from k2.model.transformer import Transformer

SHAPE = ModelConfig(
    vocab_size=320,
    hidden_size=16,
    intermediate_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=1024,
    initializer_range=0.3,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["user assistant 0123456789"] * 3, 320, digits_per_token=1, special_slots=20)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(SHAPE).initialize(1)


def test_scores_are_reproducible_and_named_by_task(tokenizer: Tokenizer, model: Transformer) -> None:
    tasks = [get_task("addition_1"), get_task("tool_call")]
    first = evaluate(Engine(model), tokenizer, tasks, 12, "sampled", 3, max_tokens=4)
    assert sorted(first) == ["addition_1", "tool_call"]
    assert set(first["addition_1"]) == {"accuracy", "low", "high", "n"}
    assert first["addition_1"]["n"] == 12
    assert first == evaluate(Engine(model), tokenizer, tasks, 12, "sampled", 3, max_tokens=4)


def test_a_model_that_always_says_the_same_scores_what_it_should(tokenizer: Tokenizer) -> None:
    model = Transformer(SHAPE).initialize(1)
    tasks = [get_task("addition_1")]
    examples = [tasks[0].sample(split_seed("eval", 5), index) for index in range(200)]
    word = next(example.answer["content"] for example in examples if len(example.answer["content"]) == 1)
    (digit,) = tokenizer.encode(word)
    end = tokenizer.special["<|im_end|>"]
    middle = tokenizer.special["<|im_middle|>"]
    with torch.no_grad():  # silence the layers, then let the embedding of the last token decide
        for layer in model.layers.values():
            layer.self_attn.o_proj.weight.zero_()
            for name, parameter in layer.mlp.named_parameters():
                if "down" in name:
                    parameter.zero_()
        model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        model.embed_tokens.weight[middle, 0] = model.lm_head.weight[digit, 0] = 8.0
        model.embed_tokens.weight[digit, 1] = model.lm_head.weight[end, 1] = 8.0
    share = sum(example.answer["content"] == word for example in examples) / 200
    assert share > 0
    for mode in ("greedy", "sampled"):
        assert evaluate(Engine(model), tokenizer, tasks, 200, mode, 5, 4)["addition_1"]["accuracy"] == share
    mixture = evaluate_mixture(Engine(model), tokenizer, {"addition_1": 1.0}, 50, "greedy", 5, 4)
    assert set(mixture.texts) == {word}
    assert mixture.by_task()["addition_1"] == mixture.score.json()


def test_prompts_end_where_the_assistant_begins_and_hold_no_system_message(tokenizer: Tokenizer) -> None:
    example = get_task("addition_2").sample(0, 0)
    text = tokenizer.decode(encode_prompt(tokenizer, example))
    problem = example.messages[0]["content"]
    assert text == f"<|im_user|>user<|im_middle|>{problem}<|im_end|><|im_assistant|>assistant<|im_middle|>"


def test_the_end_token_is_not_part_of_an_answer(tokenizer: Tokenizer) -> None:
    assert answer_text(tokenizer, [*tokenizer.encode("12"), tokenizer.special["<|im_end|>"]]) == "12"
    assert answer_text(tokenizer, tokenizer.encode("12")) == "12"


def test_a_score_carries_its_interval() -> None:
    score = Score.of([True] * 30 + [False] * 70)
    assert score.accuracy == 0.3
    assert score.low < 0.3 < score.high


def test_heldout_loss_equals_a_plain_loop(model: Transformer) -> None:
    tokens = np.random.default_rng(0).integers(0, 320, 100).astype(np.uint16)
    offsets = np.array([0, 37, 64, 100])
    total, count = 0.0, 0
    for start in range(0, 96, 24):
        row = torch.tensor(tokens[start : start + 25].astype(np.int64))
        hidden, _ = model(row[None, :-1])
        losses = F.cross_entropy(model.logits(hidden)[0], row[1:], reduction="none")
        kept = [i for i in range(24) if start + i + 1 not in offsets]
        total, count = total + losses[kept].sum().item(), count + len(kept)
    assert heldout_loss(model, tokens, offsets, 24, rows=3) == pytest.approx(total / count, rel=1e-5)


def test_too_little_heldout_text_is_a_user_error(model: Transformer) -> None:
    with pytest.raises(UserError, match="held-out text has 10 tokens"):
        heldout_loss(model, np.zeros(10, np.uint16), np.array([0, 10]), 24)
