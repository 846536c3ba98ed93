"""Generation: equal to full forward passes and to transformers, independent of what else is in the batch."""

from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2.errors import UserError
from k2.model import sampling
from k2.model.decode import Decoder, Prepared
from k2.model.folding import layer_weights
from k2.model.generate import Engine, Sample
from k2.model.sampling import RowSampling, SamplingConfig, choose, stream_key, uniforms
from k2.model.transformer import DecoderLayer, Transformer
from tests.model.reference import SHAPES, TINY, build, build_reference

PROMPTS = [[5, 6, 7, 8, 9], [11], [3, 1, 4, 1, 5, 9, 2, 6], [50, 60]]


@torch.inference_mode()
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_decoding_from_the_cache_equals_the_full_forward_pass(shape: str) -> None:
    model = build(SHAPES[shape])
    tokens = torch.randint(90, (3, 12), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([5, 2, 7])
    full, _ = model(tokens)
    decoder = Decoder(Prepared(model), 3, 12)
    rows = torch.arange(3)
    decoder.prefill(tokens[:, :6], rows)
    lengths = lengths - 1
    for _ in range(6):
        logits = decoder.step(tokens[rows, lengths].tolist(), lengths.tolist())
        torch.testing.assert_close(logits, model.logits(full[rows, lengths]), rtol=1e-10, atol=1e-12)
        lengths = lengths + 1


@pytest.mark.parametrize("shape", ["plain", "yarn", "groups", "full_query", "one_expert"])
def test_greedy_generation_equals_transformers_token_for_token(shape: str) -> None:
    model = build(SHAPES[shape]).float()
    model.compute_dtype = torch.float32
    reference = build_reference(model)
    ours = Engine(model).generate(PROMPTS, 1, SamplingConfig(max_tokens=20, temperature=0.0))
    width = max(map(len, PROMPTS))
    left_padded = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    keep = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    generated = reference.generate(
        left_padded, attention_mask=keep, do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0
    )
    assert [sample.token_ids for (sample,) in ours] == generated[:, width:].tolist()
    alone = [Engine(model).generate([prompt], 1, SamplingConfig(20, temperature=0.0))[0] for prompt in PROMPTS]
    assert [sample.token_ids for (sample,) in alone] == generated[:, width:].tolist()


def sampled(model: Transformer, prompts: list[list[int]], n: int, budget: int, **values: float) -> list[list[Sample]]:
    config = SamplingConfig(max_tokens=14, seed=3, **values)  # type: ignore[arg-type]
    return Engine(model, eos_ids=[7, 8, 9, 10], max_batch_tokens=budget).generate(prompts, n, config)


@pytest.mark.parametrize("values", [{}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 5}, {"temperature": 1.6}])
def test_samples_do_not_depend_on_the_batch(values: dict[str, float]) -> None:
    model = build(TINY)
    together = sampled(model, PROMPTS, 6, 10**6, **values)
    squeezed = sampled(model, PROMPTS, 6, 75, **values)
    reordered = sampled(model, PROMPTS[::-1], 6, 10**6, **values)[::-1]
    alone = [sampled(model, [prompt], 6, 10**6, **values)[0] for prompt in PROMPTS]
    tokens = [[s.token_ids for group in run for s in group] for run in (together, squeezed, reordered, alone)]
    assert tokens[0] == tokens[1] == tokens[2] == tokens[3]
    assert len({tuple(ids) for ids in tokens[0]}) > 20
    assert {s.finish_reason for group in together for s in group} == {"stop", "length"}


@pytest.mark.parametrize("values", [{"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.7}, {"top_k": 4}, {}])
def test_log_probabilities_equal_those_of_a_full_forward_pass(values: dict[str, float]) -> None:
    model = build(TINY)
    for prompt, group in zip(PROMPTS, sampled(model, PROMPTS, 3, 400, **values), strict=True):
        for sample in group:
            tokens = torch.tensor([prompt + sample.token_ids])
            hidden, _ = model(tokens[:, :-1])
            logits = model.logits(hidden)[0, len(prompt) - 1 :].detach()
            chosen = tokens[0, len(prompt) :, None]
            policy = logits.log_softmax(-1).gather(1, chosen)[:, 0]
            torch.testing.assert_close(torch.tensor(sample.policy_logprobs).double(), policy, rtol=1e-6, atol=1e-6)
            expected = [float(restricted(row, **values)[token]) for row, token in zip(logits, chosen, strict=True)]
            np.testing.assert_allclose(sample.logprobs, expected, rtol=1e-5, atol=1e-6)


def restricted(logits: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> torch.Tensor:
    """Token by token: log-probabilities after temperature, top-k and top-p."""
    probabilities = (logits / temperature).softmax(-1)
    kept, mass = torch.zeros_like(probabilities), 0.0
    order = probabilities.argsort(descending=True).tolist()
    allowed = order[: top_k or None]
    total = float(probabilities[allowed].sum())
    for token in allowed:
        if mass >= top_p:
            break
        kept[token] = probabilities[token]
        mass += float(probabilities[token]) / total
    return (kept / kept.sum()).log()


def test_stop_sequences_and_stop_tokens_end_a_sample() -> None:
    model = build(TINY)
    greedy = SamplingConfig(max_tokens=12, temperature=0.0)
    (free,) = Engine(model).generate([[5, 6, 7]], 1, greedy)[0]
    pair = tuple(free.token_ids[3:5])
    first = next(i for i in range(12) if tuple(free.token_ids[i : i + 2]) == pair)
    stopping = SamplingConfig(max_tokens=12, temperature=0.0, stop_sequences=(pair,))
    (sample,) = Engine(model).generate([[5, 6, 7]], 1, stopping)[0]
    assert (sample.token_ids, sample.finish_reason) == (free.token_ids[: first + 2], "stop")
    single = SamplingConfig(max_tokens=12, temperature=0.0, stop_ids=(free.token_ids[2],))
    (sample,) = Engine(model).generate([[5, 6, 7]], 1, single)[0]
    assert sample.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[2]) + 1]


def test_one_configuration_per_prompt_and_streaming() -> None:
    model = build(TINY)
    configs = [SamplingConfig(3, 0.0), SamplingConfig(9, 1.0, seed=4), SamplingConfig(5, 0.8, top_k=3)]
    streamed: dict[tuple[int, int], list[int]] = {}
    engine = Engine(model, max_batch_tokens=40)
    together = engine.generate(
        PROMPTS[:3], 2, configs, on_token=lambda p, s, token: streamed.setdefault((p, s), []).append(token)
    )
    for number, (prompt, config) in enumerate(zip(PROMPTS, configs, strict=False)):
        assert [s.token_ids for s in together[number]] == [s.token_ids for s in engine.generate([prompt], 2, config)[0]]
        assert [s.token_ids for s in together[number]] == [streamed[number, 0], streamed[number, 1]]
        assert len(together[number][0].token_ids) == config.max_tokens


def test_refresh_takes_over_new_weights_and_transformed_experts() -> None:
    model = Transformer(TINY, compute_dtype=torch.bfloat16).initialize(0)
    engine, config = Engine(model), SamplingConfig(12, 0.0)
    before = engine.generate([[1, 2]], 1, config)
    model.initialize(1)
    engine.refresh()
    assert engine.generate([[1, 2]], 1, config) != before
    model.set_weight_transform(torch.zeros_like)
    down_EDF = layer_weights(cast(DecoderLayer, model.layers["1"]), torch.bfloat16).down_EDF
    assert not down_EDF[: TINY.n_routed_experts].any()
    assert down_EDF[TINY.n_routed_experts :].any()  # the shared expert is not transformed
    before = engine.generate([[1, 2]], 1, config)
    engine.refresh()
    assert engine.generate([[1, 2]], 1, config) != before


@pytest.mark.parametrize(
    ("prompt", "config", "message"),
    [
        ([], SamplingConfig(1), "is empty"),
        ([97], SamplingConfig(1), r"outside \[0, 97\)"),
        ([1] * 250, SamplingConfig(7), r"at most 256 \(max_position_embeddings\)"),
    ],
)
def test_a_prompt_that_cannot_run_is_named(prompt: list[int], config: SamplingConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Engine(build(TINY)).generate([[1], prompt], 1, config)


@pytest.mark.parametrize("values", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}])
def test_sampling_values_outside_their_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"sampling.{next(iter(values))}"):
        SamplingConfig(**({"max_tokens": 1} | values))  # type: ignore[arg-type]


def test_choices_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf]).expand(40_000, 4)
    rows = RowSampling.of([SamplingConfig(1, temperature=0.5)] * 40_000, torch.device("cpu"))
    keys = np.array([stream_key(0, [1, 2], number) for number in range(40_000)], dtype=np.uint64)
    uniform = uniforms(keys, np.zeros(40_000, dtype=np.uint64))
    tokens, _, _ = choose(logits, rows, torch.from_numpy(uniform))
    frequency = torch.bincount(tokens, minlength=4) / 40_000
    torch.testing.assert_close(frequency, (logits[0] / 0.5).softmax(-1), atol=0.01, rtol=0)


def test_drawing_a_block_first_draws_the_same_token(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 4 * sampling.BLOCK, generator=generator, dtype=torch.float64) * 4
    logits[:, ::3] = -torch.inf
    logits[:7, : 2 * sampling.BLOCK] = -torch.inf
    uniform = torch.rand(300, generator=generator, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1.0 - 2.0**-53])
    rows = RowSampling.of([SamplingConfig(1)] * 300, torch.device("cpu"))
    monkeypatch.setattr(sampling, "BLOCKWISE", 2**60)
    at_once, _, _ = choose(logits, rows, uniform)
    monkeypatch.setattr(sampling, "BLOCKWISE", 0)
    by_block, logprobs, _ = choose(logits, rows, uniform)
    assert at_once.tolist() == by_block.tolist()
    assert torch.isfinite(logprobs).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=9), st.floats(0.0, 1.0, exclude_max=True))
def test_a_choice_always_has_positive_probability(values: list[float], uniform: float) -> None:
    logits = torch.tensor([values])
    rows = RowSampling.of([SamplingConfig(1, top_p=0.9, top_k=3)], torch.device("cpu"))
    token, logprob, policy = choose(logits, rows, torch.tensor([uniform], dtype=torch.float64))
    assert torch.isfinite(logprob).all()
    assert policy <= logprob + 1e-5
    assert 0 <= int(token) < len(values)
