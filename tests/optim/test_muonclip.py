"""MuonClip against torch's Muon and AdamW run on the logical matrices one by one."""

import pytest
import torch
from torch import Tensor, nn

from k2.config.optimizer import OptimizerConfig
from k2.model.layout import LogicalTensor, logical_tensors
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from tests.optim.tiny import TINY

LR, STEPS = 0.02, 4
LAYOUT = {t.name: t for t in logical_tensors(TINY) if t.group != "none"}


def part(tensor: LogicalTensor, values: Tensor) -> Tensor:
    """The logical tensor's slice of its parameter."""
    values = values[tensor.index] if tensor.index else values
    return values if tensor.rows is None else values[tensor.rows]


def model(dtype: torch.dtype = torch.float32) -> Transformer:
    return Transformer(TINY).initialize(3).to(dtype)


def optimizer(net: nn.Module, **changes: object) -> MuonClip:
    return MuonClip(net.named_parameters(), logical_tensors(TINY), OptimizerConfig(tau=None, **changes), lr=LR)


def gradients(net: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in net.named_parameters()}


def advance(net: nn.Module, optim: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for name, gradient in gradients(net, step).items():
            net.get_parameter(name).grad = gradient.to(net.get_parameter(name).dtype)
        optim.step()


@pytest.mark.parametrize("nesterov", [True, False])
def test_parity_with_torch_on_every_logical_matrix(nesterov: bool) -> None:
    net = model()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    copies = {name: nn.Parameter(part(t, start[t.parameter]).clone()) for name, t in LAYOUT.items()}
    muon = [copies[name] for name, t in LAYOUT.items() if t.group == "muon"]
    adamw = [copies[name] for name, t in LAYOUT.items() if t.group == "adamw"]
    peers = [
        torch.optim.Muon(
            muon, lr=LR, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(adamw, lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
    ]
    advance(net, optimizer(net, nesterov=nesterov, newton_schulz="moonlight"), range(STEPS))
    for step in range(STEPS):
        found = gradients(net, step)
        for name, tensor in LAYOUT.items():
            copies[name].grad = part(tensor, found[tensor.parameter]).clone()
        for peer in peers:
            peer.step()
    for name, tensor in LAYOUT.items():
        ours = part(tensor, net.get_parameter(tensor.parameter).detach())
        moved = (copies[name] - part(tensor, start[tensor.parameter])).norm()
        allowed = 0.06 if tensor.group == "muon" else 1e-5  # bfloat16 iterations against float32 arithmetic
        assert (ours - copies[name]).norm() < allowed * moved, name


def test_experts_are_orthogonalised_alone() -> None:
    net = model()
    optim = optimizer(net, weight_decay=0.0, nesterov=False, newton_schulz_bf16=False)
    before = net.layers["1"].mlp.experts.gate_up_proj.detach().clone()
    advance(net, optim, range(1))
    update = (before - net.layers["1"].mlp.experts.gate_up_proj.detach()) / LR
    for matrix in (*update[:, :8], *update[:, 8:]):
        values = torch.linalg.svdvals(matrix) / (0.2 * 16**0.5)
        assert values.min() > 0.6
        assert values.max() < 1.25


def test_update_rms_is_that_of_adamw() -> None:
    net = model()
    optim = optimizer(net)
    advance(net, optim, range(1))
    assert 0.15 < optim.update_rms < 0.25


def test_weight_decay_reaches_gains() -> None:
    net = model()
    optim = optimizer(net, weight_decay=0.5)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optim.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 - LR * 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(dtype: torch.dtype) -> None:
    straight, resumed = model(dtype), model(dtype)
    advance(straight, optimizer(straight), range(6))
    first = optimizer(resumed)
    advance(resumed, first, range(3))
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    weights = {name: tensor.clone() for name, tensor in resumed.state_dict().items()}
    again = Transformer(TINY).to(dtype)
    again.load_state_dict(weights)
    second = optimizer(again)
    second.load_state_dict(saved)
    assert all(tensor.dtype == saved[name].dtype for name, tensor in second.state_dict().items())
    advance(again, second, range(3, 6))
    for name, p in straight.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name


def test_low_precision_weights_have_float32_masters_that_qk_clip_scales_too() -> None:
    net = model(torch.bfloat16)
    optim = MuonClip(net.named_parameters(), logical_tensors(TINY), OptimizerConfig(tau=1.0, weight_decay=0.0), lr=0.0)
    before = net.layers["0"].self_attn.q_b_proj.weight.detach().clone()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optim.qk_clip.observe(torch.full((2, 2), 4.0))
    optim.step()
    weight = net.layers["0"].self_attn.q_b_proj.weight.detach()
    master = optim.state_dict()["master.layers.0.self_attn.q_b_proj.weight"]
    assert torch.equal(master[:4], before[:4].float() * 0.5)
    assert torch.equal(weight, master.bfloat16())
    assert optim.clip_report.clipped == 4


def test_state_of_another_model_is_refused() -> None:
    net = model()
    optim = optimizer(net)
    state = optim.state_dict()
    state.pop("steps")
    with pytest.raises(ValueError, match="steps"):
        optim.load_state_dict(state)


def test_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="closure"):
        optimizer(model()).step(lambda: 0.0)
