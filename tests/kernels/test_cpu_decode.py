"""Generation in C: against float64 and torch's operators, and the same bits whatever is in the batch."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from k2.config.base import Kernels
from k2.config.model import ModelConfig
from k2.kernels.cpu.build import library
from k2.kernels.cpu.decode import TOKENS, Packed, draw
from k2.model.backend import use_kernels
from k2.model.decode import Decoder, Prepared
from k2.model.generate import Engine
from k2.model.sampling import SamplingConfig
from k2.model.transformer import Transformer
from tests.model.reference import SHAPES, TINY, build

WIDE = TINY.model_copy(  # more than one vector of everything, and 320 experts in groups
    update={
        "hidden_size": 70, "q_lora_rank": 33, "kv_lora_rank": 75, "qk_rope_head_dim": 18, "v_head_dim": 9,
        "moe_intermediate_size": 21, "n_routed_experts": 320, "num_experts_per_tok": 5, "n_group": 8, "topk_group": 3,
    }
)  # fmt: skip


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    if library() is None:
        pytest.skip("needs a C compiler: install gcc")
    yield
    use_kernels("auto")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (6, 32), (31, 33), (64, 100)])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 19])
def test_packed_product(inputs: int, outputs: int, rows: int) -> None:
    weight_EOI, x = random(3, outputs, inputs).bfloat16(), random(rows, inputs + inputs % 2, seed=1).bfloat16()
    for number in range(3):
        out = torch.empty(rows, outputs)
        Packed(weight_EOI).product(x, number, out)()
        exact = x[:, :inputs].double() @ weight_EOI[number].double().T
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def bfloat16(config: ModelConfig) -> Transformer:
    model = build(config).float()
    model.compute_dtype = torch.bfloat16
    return model


def logits_after(model: Transformer, tokens_BL: Tensor, kernels: Kernels = "auto") -> Tensor:
    """Logits of every last token: a prompt, then three steps."""
    use_kernels(kernels)
    rows, length = tokens_BL.shape
    decoder = Decoder(Prepared(model), rows, length)
    assert (decoder.stepper is not None) == (kernels == "auto")
    decoder.prefill(tokens_BL[:, : length - 3], torch.arange(rows))
    return [decoder.step(tokens_BL[:, i].tolist(), [i] * rows) for i in range(length - 3, length)][-1]


@torch.inference_mode()
@pytest.mark.parametrize("config", [*SHAPES.values(), WIDE], ids=[*SHAPES, "wide"])
def test_logits_are_nearer_to_float64_than_those_of_torchs_operators(config: ModelConfig) -> None:
    model = build(config)
    tokens = torch.randint(90, (24, 40), generator=torch.Generator().manual_seed(3))
    exact = model.logits(model(tokens)[0][:, -1])
    errors = [
        (logits_after(bfloat16(config), tokens, kernels) - exact).abs().median() for kernels in ("auto", "torch")
    ]  # the median: a token near a routing tie may go to another expert
    assert 0 < errors[0] < 1.05 * errors[1]


@torch.inference_mode()
def test_bits_do_not_depend_on_the_batch_or_on_threads() -> None:
    model, rows = bfloat16(WIDE), 21
    tokens = torch.randint(90, (rows, 40), generator=torch.Generator().manual_seed(4))
    assert rows * 37 > 2 * TOKENS  # a prompt is cut between two calls
    together = logits_after(model, tokens)
    assert torch.equal(logits_after(model, tokens.flip(0)).flip(0), together)
    alone = [logits_after(model, tokens[row : row + 1])[0] for row in range(0, rows, 4)]
    assert torch.equal(torch.stack(alone), together[::4])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(logits_after(model, tokens), together)
    finally:
        torch.set_num_threads(before)


def test_samples_and_their_probabilities_are_the_same_bits_in_any_batch() -> None:
    prompts = [[5, 6, 7, 8, 9], [11], [3, 1, 4, 1, 5, 9, 2, 6], [50, 60]]
    config, engine = SamplingConfig(14, temperature=1.2, seed=3), Engine(bfloat16(TINY), eos_ids=[7, 8])
    together = engine.generate(prompts, 5, config)
    engine.max_batch_tokens = 60
    assert engine.generate(prompts, 5, config) == together
    assert [engine.generate([prompt], 5, config)[0] for prompt in prompts] == together


@torch.inference_mode()
def test_a_row_sees_its_own_slots_only() -> None:
    """Rows of unequal length, and garbage of earlier samples behind them."""
    model = bfloat16(TINY)
    tokens = torch.randint(90, (3, 9), generator=torch.Generator().manual_seed(5))
    alone = [logits_after(model, tokens[row : row + 1, :length])[0] for row, length in enumerate((9, 5, 7))]
    decoder = Decoder(Prepared(model), 3, 20)
    decoder.cache.values_NSLC.fill_(torch.nan)
    decoder.prefill(tokens, torch.arange(3))
    logits = decoder.step([int(tokens[0, 8]), int(tokens[1, 4]), int(tokens[2, 6])], [8, 4, 6])
    assert torch.equal(logits, torch.stack(alone))


@pytest.mark.parametrize("vocabulary", [1, 15, 64, 1003])
def test_draw(vocabulary: int) -> None:
    rows = 60
    logits, uniform = random(rows, vocabulary, seed=2) * 3, torch.rand(rows, dtype=torch.float64)
    logits[:, 1::3] = -torch.inf
    temperature, greedy = torch.ones(rows), torch.zeros(rows, dtype=torch.bool)
    temperature[20:40], greedy[40:] = 0.6, True
    uniform[:2] = torch.tensor([0.0, 1 - 2**-52], dtype=torch.float64)
    tokens, sampled, policy = draw(logits, temperature, greedy, uniform)
    tempered = logits.double().div(temperature[:, None]).log_softmax(-1)
    cdf = tempered.exp().cumsum(-1)
    at_least, before = (
        cdf.gather(1, tokens[:, None])[:, 0] - x for x in (0, tempered.exp().gather(1, tokens[:, None])[:, 0])
    )
    assert (before[:40] - 1e-6 <= uniform[:40]).all()
    assert (uniform[:40] <= at_least[:40] + 1e-6).all()
    assert torch.equal(tokens[40:], logits[40:].argmax(-1))
    expected = tempered.gather(1, tokens[:, None])[:, 0].masked_fill(greedy, 0.0)
    torch.testing.assert_close(sampled.double(), expected, rtol=1e-5, atol=1e-5)
    exact = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(policy.double(), exact, rtol=1e-5, atol=1e-5)


def test_logits_that_are_no_numbers_stay_in_range_and_show() -> None:
    logits = torch.zeros(3, 70)
    logits[0], logits[1, 5], logits[2, 9] = torch.nan, torch.nan, torch.inf
    for greedy in (False, True):
        tokens, _, policy = draw(logits, torch.ones(3), torch.full((3,), greedy), torch.full((3,), 0.5).double())
        assert ((tokens >= 0) & (tokens < 70)).all()
        assert not policy.isfinite().any()
