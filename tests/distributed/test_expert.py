"""The dispatcher over a group of one rank: what runs while tokens travel, what is kept, and a rank without tokens."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from k2.distributed import expert
from k2.distributed.expert import Flight, Journey, divide_experts
from k2.model.moe import Experts, MixtureOfExperts
from tests.training.small import MODEL


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def mixture() -> MixtureOfExperts:
    torch.manual_seed(0)
    found = MixtureOfExperts(MODEL)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return found


def gradients(found: MixtureOfExperts, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of input and parameters."""
    output, _ = found(x)
    return [output, *torch.autograd.grad(output.square().sum(), [x, *found.parameters()])]


def test_tokens_that_travel_get_what_local_ones_get(group: dist.ProcessGroup) -> None:
    x = torch.randn(2, 8, MODEL.hidden_size, requires_grad=True)
    here = gradients(mixture(), x)
    away = mixture()
    divide_experts(away, group)
    for ours, theirs in zip(gradients(away, x), here, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_shared_expert_runs_while_tokens_and_their_gradients_travel(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Noted(Flight):
        def __init__(self, *arguments: object) -> None:
            seen.append("depart")
            super().__init__(*arguments)  # type: ignore[arg-type]

        def land(self) -> torch.Tensor:
            seen.append("land")
            return super().land()

    monkeypatch.setattr(expert, "Flight", Noted)
    found = mixture()
    divide_experts(found, group)
    assert found.shared_experts is not None
    found.shared_experts.register_forward_hook(lambda *_: seen.append("shared"))
    found.shared_experts.register_full_backward_hook(lambda *_: seen.append("shared"))
    output, _ = found(torch.randn(2, 8, MODEL.hidden_size, requires_grad=True))
    there, back = ["depart", "depart", "shared", "land", "land"], ["depart", "land"]
    assert seen == there + back
    seen.clear()
    output.sum().backward()
    assert seen == back + there


def test_nothing_stays_of_a_forward_pass_that_is_dropped(group: dist.ProcessGroup) -> None:
    found = mixture()
    divide_experts(found, group)
    gc.collect()
    gc.disable()
    try:
        found(torch.randn(2, 8, MODEL.hidden_size, requires_grad=True))
        alive = [each for each in gc.get_objects() if type(each) is Journey]
    finally:
        gc.enable()
    assert not alive


def test_experts_that_no_token_chose() -> None:
    experts = mixture().experts
    assert isinstance(experts, Experts)
    x, weights = torch.zeros(0, MODEL.hidden_size, requires_grad=True), torch.zeros(0, 1, requires_grad=True)
    output = experts(x, torch.zeros(0, 1, dtype=torch.int64), weights)
    assert output.shape == x.shape
    output.sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in experts.parameters())
