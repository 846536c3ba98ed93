"""The embedded model: parity with transformers, determinism, the weight cache."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from k2.generation.llama import Llama, LlamaShape
from k2.generation.protocol import GenerationRequest
from k2.generation.smollm import SmolLM, _choose, chat_prompt
from k2.generation.weights import find_gguf, load_checkpoint


def tiny_llama() -> tuple[LlamaForCausalLM, Llama]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
    )
    theirs = LlamaForCausalLM(config).eval()
    shape = LlamaShape(3, 6, 2, config.rms_norm_eps, 1000.0, 64)
    return theirs, Llama(shape, theirs.state_dict())


def test_logits_equal_transformers_with_padding_and_cache() -> None:
    theirs, ours = tiny_llama()
    ids_BL = torch.randint(0, 97, (3, 12))
    pad_B = torch.tensor([0, 4, 7])
    cache = ours.new_cache(3, 12)
    with torch.inference_mode():
        steps = [ours.forward(ids_BL[:, :9], cache, 0, pad_B)]
        steps += [ours.forward(ids_BL[:, n : n + 1], cache, n, pad_B) for n in range(9, 12)]
        for row, pad in enumerate(pad_B.tolist()):
            expected_LV = theirs(input_ids=ids_BL[row : row + 1, pad:]).logits[0, -4:]
            torch.testing.assert_close(torch.stack([step[row] for step in steps]), expected_LV, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("k2-home")


@pytest.fixture(scope="module")
def model(home: Path) -> SmolLM:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("K2_HOME", str(home))
        return SmolLM(4096)


def ask(text: str, **values: object) -> GenerationRequest:
    return GenerationRequest([{"role": "user", "content": text}], **{"max_tokens": 16, **values})


def test_it_answers_stops_and_streams(model: SmolLM) -> None:
    pieces: list[str] = []
    question = "What is the capital of France?"
    [answer] = model.generate([ask(question)], stream=lambda _, text: pieces.append(text))
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    assert "".join(pieces) == answer.text
    assert len(answer.token_ids) == len(answer.logprobs) == answer.usage.completion_tokens
    [cut] = model.generate([ask(question, stop=["Paris"])])
    assert "Paris" not in cut.text


def test_same_requests_same_answers(model: SmolLM) -> None:
    requests = [ask("Name a colour.", temperature=1.0, seed=seed) for seed in (1, 2, 3)] + [ask("Count to 3.")]
    first = model.generate(requests)
    assert model.generate(requests) == first
    assert len({answer.text for answer in first[:3]}) > 1


def test_a_prompt_beyond_the_context_fails_alone(model: SmolLM) -> None:
    long, short = model.generate([ask("word " * 9000), ask("Hi")])
    assert long.finish_reason == "error"
    assert "room for" in long.text
    assert short.finish_reason != "error"


def test_nucleus_sampling_follows_the_distribution() -> None:
    logprobs_T = torch.tensor([0.5, 0.3, 0.2]).log()
    random = torch.Generator().manual_seed(0)
    request = ask("", temperature=1.0, top_p=0.75)
    draws = [_choose(logprobs_T, request, random) for _ in range(2000)]
    assert set(draws) == {0, 1}
    assert abs(draws.count(0) / len(draws) - 0.625) < 0.04


def test_the_prompt_is_the_models_chat_template() -> None:
    prompt = chat_prompt([{"role": "user", "content": "Hi"}])
    assert prompt.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_a_damaged_weight_cache_is_rebuilt(
    model: SmolLM, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("K2_HOME", str(home))
    first = load_checkpoint(find_gguf())
    [cached] = (home / "cache" / "weights").iterdir()
    blob = bytearray(cached.read_bytes())
    blob[len(blob) // 2] ^= 1
    cached.write_bytes(blob)
    with caplog.at_level(logging.WARNING):
        second = load_checkpoint(find_gguf())
    assert "damaged" in caplog.text
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    assert cached.stat().st_size == len(blob)
