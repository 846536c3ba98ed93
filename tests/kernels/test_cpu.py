"""The C kernels against float64, against torch's operators inside the whole model, and where they cannot be built."""

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from k2.config.base import Kernels
from k2.config.model import ModelConfig
from k2.config.optimizer import OptimizerConfig
from k2.kernels import cpu
from k2.kernels.cpu.build import LEVELS, SOURCES, architecture, build, compiler
from k2.model.backend import runs_in_c, use_kernels
from k2.model.layout import logical_tensors
from k2.model.rope import rotate
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip

SHAPES = [(1, 1), (3, 16), (65, 17), (130, 96), (7, 250)]
HALF_STEP = 2**-8
"""Relative error of rounding to bfloat16, once."""


def bf16(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def close(found: Tensor, exact: Tensor, *, rel: float = HALF_STEP, abs_: float = 1e-6) -> None:
    """`found` is `exact` rounded, up to float32's error relative to the largest value."""
    slack = abs_ + 1e-5 * float(exact.abs().max()) + rel * exact.abs()
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= slack).all()


@pytest.fixture
def kernels() -> Iterator[None]:
    if not cpu.serves(bf16(1)):
        pytest.skip("needs a C compiler: install gcc")
    yield
    use_kernels("auto")


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_rms_norm(kernels: None, rows: int, width: int) -> None:
    x, grad, weight = bf16(rows, width, scale=3), bf16(rows, width, seed=1), torch.rand(width) + 0.5
    wide = x.double().requires_grad_()
    gain = weight.double().requires_grad_()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain
    exact_x, exact_gain = torch.autograd.grad(exact, [wide, gain], grad.double())
    out, scale = cpu.rms_norm(x, weight, 1e-6)
    grad_x, grad_gain = cpu.rms_norm_backward(grad, x, weight, scale)
    close(out, exact.detach())
    close(grad_x, exact_x)
    close(grad_gain, exact_gain, rel=1e-5)


@pytest.mark.parametrize(("rows", "inner"), SHAPES)
@pytest.mark.parametrize("size", [1.0, 40.0], ids=["usual", "saturated"])
def test_gated(kernels: None, rows: int, inner: int, size: float) -> None:
    gate_up, grad, scale = bf16(rows, 2 * inner, scale=size), bf16(rows, inner, seed=1), torch.rand(rows)
    wide, factor = gate_up.double().requires_grad_(), scale.double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    exact = F.silu(gate) * up * factor[:, None]
    exact_gate_up, exact_scale = torch.autograd.grad(exact, [wide, factor], grad.double())
    grad_gate_up, grad_scale, again = cpu.gated_backward(grad, gate_up, scale)
    assert torch.equal(again, cpu.gated(gate_up, scale))
    close(again, exact.detach())
    close(grad_gate_up, exact_gate_up)
    close(grad_scale, exact_scale, rel=1e-5)


def test_scale_rows(kernels: None) -> None:
    x, scale, out = bf16(5, 37), torch.randn(5), torch.empty(5, 37, dtype=torch.bfloat16)
    close(cpu.scale_rows(x, scale, out), x.double() * scale.double()[:, None])


@pytest.mark.parametrize(("queries", "start"), [(1, 0), (5, 0), (16, 16), (33, 47)])
@pytest.mark.parametrize("masked", [False, True])
def test_causal_softmax(kernels: None, queries: int, start: int, masked: bool) -> None:
    batch, heads, length = 2, 3, start + queries
    logits = bf16(batch * heads, queries, length, scale=4) - 30  # a zero in a masked place would be the largest
    bias = torch.zeros(batch, length, length)
    if masked:
        bias[:, :, : length // 2] = -torch.inf
        bias += torch.zeros(length).masked_fill(torch.eye(length, dtype=torch.bool), 0)
        bias.diagonal(dim1=1, dim2=2).zero_()
    causal = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    seen = logits.double().view(batch, heads, queries, length) + (bias.double() + causal)[:, None, start:]
    exact = seen.softmax(-1).flatten(0, 1)
    row_max = torch.full((batch, heads, length), torch.nan)
    found = cpu.causal_softmax(logits.clone(), bias if masked else None, row_max, start)
    close(found, exact)
    assert torch.equal(row_max[:, :, start:].double(), seen.amax(-1))
    assert row_max[:, :, :start].isnan().all()
    grad = bf16(*logits.shape, seed=1)
    p, g = found.double(), grad.double()
    close(cpu.causal_softmax_backward(grad.clone(), found, start), p * (g - (p * g).sum(-1, keepdim=True)))


@pytest.mark.parametrize("vocabulary", [1, 15, 64, 1003])
def test_surplus(kernels: None, vocabulary: int) -> None:
    logits, targets = bf16(9, vocabulary, scale=8), torch.arange(9) % vocabulary
    wide = logits.double()
    log_probs = cpu.surplus(logits, targets)
    close(log_probs, wide.log_softmax(-1).gather(1, targets[:, None])[:, 0], rel=1e-6)
    close(logits, wide.softmax(-1) - F.one_hot(targets, vocabulary), rel=2 * HALF_STEP)


def test_nan_and_infinity_are_not_hidden(kernels: None) -> None:
    for bad in (torch.nan, torch.inf):
        logits = bf16(2, 4, 40)
        logits[1, 2, 1] = bad
        row_max = torch.zeros(1, 2, 40)
        found = cpu.causal_softmax(logits, None, row_max, 36)
        assert found[1, 2].isnan().sum() > 0
        assert not found[0].isnan().any()
        assert not row_max[0, 1, 38].isfinite()
        x = bf16(3, 20)
        x[1, 7] = bad
        assert not cpu.rms_norm(x, torch.ones(20), 1e-6)[0][1].isfinite().all()
        assert not cpu.gated(x, torch.ones(3))[1].isfinite().all()


@pytest.mark.parametrize("rows", [1, 2], ids=["one table", "a table a row"])
def test_heads(kernels: None, rows: int) -> None:
    """Against the torch path: data moves, and pairs turn."""
    from k2.model.mla import _Heads

    angles = torch.rand(rows, 7, 1, 4) * 6
    inputs = [bf16(2, 7, 3, 20, seed=1), bf16(2, 7, 3, 12 + 5, seed=2), bf16(2, 7, 8, seed=3)]
    outcomes = []
    for choice in ("auto", "torch"):
        use_kernels(choice)  # type: ignore[arg-type]
        leaves = [x.clone().requires_grad_() for x in inputs]
        made = _Heads.apply(*leaves, torch.complex(angles.cos(), angles.sin()))  # type: ignore[no-untyped-call]
        grads = torch.autograd.grad(made, leaves, [bf16(*x.shape, seed=4) for x in made])
        outcomes.append([*made, *grads])
    for found, expected in zip(*outcomes, strict=True):
        close(found, expected.detach().double(), abs_=1e-2)


@pytest.mark.parametrize(("rows", "pairs"), [(1, 4), (2, 16), (2, 21)])
def test_rotation(kernels: None, rows: int, pairs: int) -> None:
    """There and back, of a slice, against the torch path."""
    angles, outcomes = torch.rand(rows, 7, pairs) * 6, []
    for choice in ("auto", "torch"):
        use_kernels(choice)  # type: ignore[arg-type]
        leaf = bf16(2, 7, 2 * pairs + 3, seed=1).requires_grad_()
        made = rotate(leaf[..., 3:], torch.complex(angles.cos(), angles.sin()))
        outcomes.append([made, *torch.autograd.grad(made, leaf, bf16(*made.shape, seed=2))])
    for found, expected in zip(*outcomes, strict=True):
        close(found, expected.detach().double(), abs_=1e-2)


def test_exponentials_are_right_to_two_units(kernels: None, tmp_path: Path) -> None:
    """From where float32 ends up to 88; infinities and what is no number stay what they are."""
    source, made = tmp_path / "exponential.c", tmp_path / "exponential.so"
    each = "EACH(count, store_wide(to + i, exponential(load_wide(from + i, n)), n);)"
    source.write_text(f'#include "vectors.h"\nvoid all_of(const float *from, float *to, long count) {{ {each} }}\n')
    folder = f"-I{Path(cpu.__file__).parent}"
    subprocess.run([*compiler(architecture()), folder, str(source), "-o", str(made), "-lm"], check=True)
    x = torch.cat([torch.linspace(-87, 88, 1_000_003), torch.linspace(-1, 1, 1_000_003), torch.zeros(1)])
    special = torch.tensor([-torch.inf, torch.nan, -200.0])
    found, ends = torch.empty_like(x), torch.empty_like(special)
    for values, to in ((x, found), (special, ends)):
        ctypes.CDLL(str(made)).all_of(*map(ctypes.c_void_p, (values.data_ptr(), to.data_ptr())), ctypes.c_long(len(to)))
    exact = x.double().exp()
    unit = torch.nextafter(exact.float(), torch.tensor(torch.inf)) - exact.float()
    assert ((found.double() - exact).abs() <= 2.001 * unit).all()
    assert found[-1] == 1
    assert ends[[0, 2]].tolist() == pytest.approx([0, 0], abs=1e-38)
    assert ends[1].isnan()


def test_momentum_and_update(kernels: None) -> None:
    """On the gate halves of stacked experts, which do not lie side by side."""
    whole = [torch.randn(5, 6, 19) for _ in range(3)]
    gradient, average, weight = (tensor[:, :3] for tensor in whole)
    out = torch.empty(5, 3, 19, dtype=torch.bfloat16)
    mean = average.double() * 0.9 + gradient.double() * 0.1
    untouched, before = whole[1][:, 3:].clone(), weight.double()
    cpu.momentum(gradient, average, out, 0.9, nesterov=True)
    close(average, mean, rel=1e-6)
    close(out, gradient.double() * 0.1 + mean * 0.9)
    squares = cpu.update(weight, out, 0.99, -0.1)
    close(weight, before * 0.99 - out.double() * 0.1, rel=1e-6)
    close(squares, out.double().square().sum((1, 2)), rel=1e-6)
    assert torch.equal(whole[1][:, 3:], untouched)


CONFIG = ModelConfig(
    vocab_size=72, hidden_size=36, intermediate_size=50, moe_intermediate_size=18, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=20, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=4, v_head_dim=14,
    n_routed_experts=4, num_experts_per_tok=2,
)  # fmt: skip


def trained(kernels: Kernels, dtype: torch.dtype = torch.bfloat16, steps: int = 3) -> tuple[Tensor, Transformer]:
    """The loss of some MuonClip steps, and the model after them."""
    use_kernels(kernels)
    model = Transformer(CONFIG, compute_dtype=dtype).initialize(1)
    optimizer = MuonClip(model.named_parameters(), logical_tensors(CONFIG), OptimizerConfig(), lr=1e-2)
    tokens = torch.randint(CONFIG.vocab_size, (3, 141), generator=torch.Generator().manual_seed(2))
    documents = (torch.arange(140) // 50).expand(3, -1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        hidden, statistics = model(tokens[:, :-1], documents_BL=documents)
        loss = model.loss(hidden, tokens[:, 1:])
        torch.autograd.backward(loss)
        optimizer.qk_clip.observe(statistics.max_logits_NH)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), model


def test_the_model_trains_as_with_torchs_operators(kernels: None) -> None:
    """Nearer to torch's bfloat16 than that is to float32: nothing but the last bit differs."""
    ours, _ = trained("auto")
    theirs, _ = trained("torch")
    wide, _ = trained("torch", torch.float32)
    assert not torch.equal(ours, theirs), "the kernels did not run"
    assert (ours - theirs).abs().max() <= max(float((theirs - wide).abs().max()), 1e-3)


def test_bits_do_not_depend_on_threads(kernels: None) -> None:
    before, models = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x, grad = bf16(300, 48), bf16(300, 48, seed=1)
            out, scale = cpu.rms_norm(x, torch.ones(48), 1e-6)
            row_max = torch.empty(1, 30, 48)
            probabilities = cpu.causal_softmax(bf16(30, 48, 48), None, row_max, 0)
            backward = cpu.rms_norm_backward(grad, x, torch.ones(48), scale)
            models.append(
                [
                    out,
                    scale,
                    probabilities,
                    row_max,
                    *backward,
                    *cpu.gated_backward(grad, torch.cat([x, x], 1), scale[:, 0]),
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*models, strict=True))


def test_only_real_bfloat16_on_this_machine_is_served(kernels: None) -> None:
    assert not cpu.serves(torch.ones(1))
    assert not cpu.serves(bf16(1).to("meta"))
    with FakeTensorMode():
        assert not cpu.serves(torch.ones(1, dtype=torch.bfloat16))
    use_kernels("torch")
    assert not runs_in_c(bf16(1))


@pytest.mark.parametrize("target", LEVELS if architecture().startswith("x86-64") else [architecture()])
def test_it_builds_for_every_processor_without_warnings(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "k2.kernels.cpu.build.FLAGS",
        ("-O1", "-fopenmp", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"),
    )
    assert build(tmp_path, target).stat().st_size > 0
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-cc", "no C compiler (no-such-cc); install gcc"), ("false", "false failed")]
)
def test_without_a_compiler_torch_runs_and_the_log_says_so_once(tmp_path: Path, compiler: str, reason: str) -> None:
    code = """
import torch
from k2.model.layers import RMSNorm
norm = RMSNorm(8, 1e-6)
for _ in range(2):
    assert norm(torch.ones(2, 8).bfloat16()).float().sum() == 16
"""
    environment = {
        "XDG_CACHE_HOME": str(tmp_path),
        "CC": compiler,
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(Path(cpu.__file__).parents[3]),
    }
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stderr.count("K2's CPU kernels are not used") == 1
    assert reason in run.stderr
    assert not list(tmp_path.glob("k2/*.so"))


def test_the_sources_are_part_of_a_stages_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from k2.execution import digest

    files = digest._c_sources("k2.kernels.cpu")
    assert sorted(files) == sorted(SOURCES)
    assert "k2.kernels.cpu" in digest.import_closure("k2.stages.pretrain")
