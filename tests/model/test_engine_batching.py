"""Continuous batching, precision and the cache: what one engine promises to rollouts, evaluation and chat."""

import pytest
import torch

from k2.config.base import Kernels
from k2.config.model import ModelConfig
from k2.errors import UserError
from k2.model.backend import use_kernels
from k2.model.cache import LatentCache
from k2.model.decode import Decoder, Prepared
from k2.model.generate import Engine
from k2.model.sampling import SamplingConfig
from k2.model.transformer import Transformer
from tests.model.reference import SHAPES, TINY, build, build_reference

PROMPTS = [[5, 6, 7, 8, 9], [11], [3, 1, 4, 1, 5, 9, 2, 6], [50, 60], [2, 2, 2]]


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every decoding step from now on."""
    rows: list[int] = []
    step = Decoder.step

    def counted(self: Decoder, tokens: list[int], slots: list[int]) -> torch.Tensor:
        rows.append(len(tokens))
        return step(self, tokens, slots)

    monkeypatch.setattr(Decoder, "step", counted)
    return rows


def test_a_finished_row_is_replaced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, limits = Engine(build(TINY), max_batch_tokens=40), [3, 12, 5, 9, 1]
    configs = [SamplingConfig(limit, seed=2) for limit in limits]
    alone = [engine.generate([p], 3, c)[0] for p, c in zip(PROMPTS, configs, strict=True)]
    rows = count_steps(monkeypatch)
    together = engine.generate(PROMPTS, 3, configs)
    assert [[s.token_ids for s in group] for group in together] == [[s.token_ids for s in group] for group in alone]
    capacity, longest = 3, max(limits)
    assert set(rows[:-longest]) == {capacity}  # while samples wait, no step has an empty row
    assert sum(rows) == 3 * sum(limits)  # and no row ever runs for nothing


def test_samples_of_a_group_that_does_not_fit_share_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts_run: list[int] = []
    prefill = Decoder.prefill

    def counted(self: Decoder, tokens_BL: torch.Tensor, rows_B: torch.Tensor) -> None:
        prompts_run.append(len(tokens_BL))
        prefill(self, tokens_BL, rows_B)

    engine, config = Engine(build(TINY), eos_ids=[7, 8, 9, 10], max_batch_tokens=40), SamplingConfig(12, seed=5)
    expected = Engine(build(TINY), eos_ids=[7, 8, 9, 10]).generate(PROMPTS[:1], 8, config)
    monkeypatch.setattr(Decoder, "prefill", counted)
    assert [s.token_ids for s in engine.generate(PROMPTS[:1], 8, config)[0]] == [s.token_ids for s in expected[0]]
    assert prompts_run == [1]


@pytest.mark.parametrize("shape", ["plain", "groups", "two_shared"])
def test_greedy_generation_in_float64_is_the_argmax_of_transformers(shape: str) -> None:
    model = build(SHAPES[shape])
    reference = build_reference(model).double()
    samples = Engine(model, max_batch_tokens=60).generate(PROMPTS, 1, SamplingConfig(16, temperature=0.0))
    for prompt, (sample,) in zip(PROMPTS, samples, strict=True):
        tokens = torch.tensor([prompt + sample.token_ids])
        with torch.no_grad():
            logits = reference(tokens).logits[0, len(prompt) - 1 : -1]
        assert sample.token_ids == logits.argmax(-1).tolist()


@torch.inference_mode()
@pytest.mark.parametrize("shape", ["plain", "groups", "two_shared", "full_query", "one_expert", "odd"])
@pytest.mark.parametrize(
    ("kernels", "rows"), [("auto", 20), ("torch", 1), ("torch", 2), ("torch", 20)]
)  # every form of products and of experts
def test_bfloat16_gives_the_logits_of_the_training_pass(
    shape: str, kernels: Kernels, rows: int, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(lambda: use_kernels("auto"))
    use_kernels(kernels)
    model = build(SHAPES[shape]).float()
    tokens = torch.randint(90, (rows, 6), generator=torch.Generator().manual_seed(3))
    model.compute_dtype = torch.float32
    reference = model.logits(model(tokens)[0][:, -1])
    model.compute_dtype = torch.bfloat16
    trained = model.logits(model(tokens)[0][:, -1]).float()
    logits = last_logits(model, tokens)
    typical = (trained - reference).abs().median()  # a token near a routing tie may go to another expert
    assert (logits - reference).abs().median() < 2 * typical


@torch.inference_mode()
@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("rows", [1, 2, 3, 20])
def test_float32_gives_the_logits_of_the_training_pass(shape: str, rows: int) -> None:
    model = build(SHAPES[shape]).float()
    model.compute_dtype = torch.float32
    tokens = torch.randint(90, (rows, 6), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(last_logits(model, tokens), model.logits(model(tokens)[0][:, -1]), atol=1e-4, rtol=1e-4)


def last_logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Five tokens as a prompt, the sixth as a step."""
    rows = len(tokens)
    decoder = Decoder(Prepared(model), rows, 6)
    decoder.prefill(tokens[:, :5], torch.arange(rows))
    return decoder.step(tokens[:, 5].tolist(), [5] * rows)


def test_the_cache_holds_576_of_20480_values() -> None:
    config = ModelConfig()
    cache = LatentCache(config, 2, 3, torch.bfloat16, torch.device("meta"))
    per_token = cache.values_NSLC.numel() // (config.num_hidden_layers * 2 * 3)
    full = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    assert (per_token, full, round(full / per_token, 1)) == (576, 20_480, 35.6)


def test_the_cache_is_allocated_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    allocate = LatentCache.__init__

    def counted(self: LatentCache, config: ModelConfig, rows: int, length: int, *rest: object) -> None:
        shapes.append((rows, length))
        allocate(self, config, rows, length, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(LatentCache, "__init__", counted)
    Engine(build(TINY), max_batch_tokens=60).generate(PROMPTS, 3, SamplingConfig(12))
    assert shapes == [(3, 20)]


def test_a_sequence_longer_than_the_cache_is_named() -> None:
    engine = Engine(build(TINY), max_batch_tokens=20)
    with pytest.raises(UserError, match=r"prompt 1 has 11 tokens .* at most 20 \(max_batch_tokens\) fit"):
        engine.generate([[1], [1] * 11], 1, SamplingConfig(10))


def test_a_prompt_that_repeats_may_be_given_twice() -> None:
    engine, config = Engine(build(TINY), max_batch_tokens=40), SamplingConfig(6, seed=1)
    first, second = engine.generate([[5, 6, 7], [5, 6, 7]], 2, [config, SamplingConfig(6, seed=2)])
    assert [s.token_ids for s in first] == [s.token_ids for s in engine.generate([[5, 6, 7]], 2, config)[0]]
    assert [s.token_ids for s in first] != [s.token_ids for s in second]


def test_the_engine_serves_bfloat16_from_float32_masters() -> None:
    model = Transformer(TINY, compute_dtype=torch.bfloat16).initialize(0)
    (sample,) = Engine(model).generate([[1, 2, 3]], 1, SamplingConfig(8))[0]
    assert len(sample.token_ids) == 8
    assert sample.logprobs == sample.policy_logprobs
    assert all(-30 < value < 0 for value in sample.logprobs)
