"""Real processes under torchrun against one process on the same data, in float64, Newton-Schulz included."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from k2.model.layout import logical_tensors
from k2.model.tensor_files import CheckpointTensors
from tests.distributed.program import CONFIG, alone, layout_of
from tests.distributed.selection import LATER

ROOT = Path(__file__).parents[2]
LAYOUTS = {
    2: [
        "1.1.2",
        "1.2.1",
        "1.2.1.recompute",
        "1.1.2.buckets",
        "2.1.1",
        "2x2.1.1",
        "2.1.1.recompute",
        "1.2.1.offload",
        "2x2.1.1.offload",
    ],
    4: ["1.2.2", "1.4.1", "1.1.4", "4.1.1", "2.2.1", "2.1.2", "2x2.2.1"],
    8: ["2.2.2", "2x2.2.2", "4.2.1", "4.1.2", "1.4.2"],
}
STORED = ["1.2.1.fp8", "2.1.1.fp8", "1.1.2.narrow"]
SINGLE = {4: ["1.2.2.float32.replayed", "1.2.2.float32"], 8: ["2x2.2.2.float32.replayed", "2x2.2.2.float32"]}
REFUSED = {
    "1.1.2.differs": "ranks disagree on config.lr: rank 1 has 1.01, rank 0 has 0.01",
    "1.1.2.other": "ranks disagree on code: rank 1 has 1, rank 0 has 0",
    "1.2.2": "layout: pp=1 x ep=2 x dp=2 are 4 ranks, but 2 were started; the nearest that works is pp=1, ep=2, dp=1",
    "1.3.1": "layout: pp=1 x ep=3 x dp=1 are 3 ranks, but 2 were started; the nearest that works is pp=1, ep=2, dp=1",
    "2x3.1.1": "layout: pp=2 x virtual_stages=3 exceed 4 layers; the nearest that works is pp=2, ep=1, dp=1",
}
ALL = [(ranks, name) for ranks, names in LAYOUTS.items() for name in names]


def many(ranks: int) -> list[pytest.MarkDecorator]:
    """More than two ranks come later."""
    return LATER if ranks > 2 else []


def launch(ranks: int, folder: Path, names: list[str]) -> Path:
    """Run `program.py` on so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(ROOT / "tests/distributed/program.py"), str(folder), *names],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return alone(torch.float64, 5)


@pytest.fixture(scope="module")
def reference32() -> dict[str, Any]:
    return alone(torch.float32, 20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, reference32: dict[str, Any]) -> Callable[[int], Path]:
    """The folder in which so many ranks left what they trained; they run once."""

    @cache
    def run(ranks: int) -> Path:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        torch.save(reference32["choices"], folder / "choices.pt")
        refused = [*REFUSED, *STORED] if ranks == 2 else []
        return launch(ranks, folder, [*refused, *LAYOUTS[ranks], *SINGLE.get(ranks, [])])

    return run


def check(folder: Path, name: str, reference: dict[str, Any]) -> None:
    found = torch.load(folder / f"{name}.pt")
    assert found["weights"].keys() == reference["weights"].keys()
    deviation = max(float((found["weights"][n] - w).abs().max()) for n, w in reference["weights"].items())
    print(f"{name}: largest deviation of a weight {deviation:.1e}")
    assert deviation <= 1e-9
    assert torch.equal(found["clips"], reference["clips"])
    assert found["clips"].any()
    for ours, theirs in zip(found["reports"], reference["reports"], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


def check_files(folder: Path, name: str) -> None:
    """What the ranks wrote together is the model, cut among them."""
    weights, layout = torch.load(folder / f"{name}.pt")["weights"], layout_of(name)[0]
    written = CheckpointTensors(folder / f"{name}.model")
    tensors = logical_tensors(CONFIG)
    assert set(written) == {tensor.name for tensor in tensors}
    assert all(torch.equal(written[t.name], t.of(weights[t.parameter]).float()) for t in tensors)
    sizes = [path.stat().st_size for path in written.files]
    assert len(sizes) == layout.ranks
    assert max(sizes) < 0.8 * sum(sizes)


def check_ranks(folder: Path, name: str, state: int) -> None:
    """Ranks that hold the same layers hold the same bytes, and optimizer state is divided without overlap."""
    layout, _ = layout_of(name)
    own = [torch.load(folder / f"{name}.{rank}.pt") for rank in range(layout.ranks)]
    for rank, found in enumerate(own):
        stage = rank - rank % layout.data_parallel
        assert found["dense"] == own[stage]["dense"]
        assert found["experts"] == own[stage + rank % layout.ep]["experts"]
    with_experts = [stage for stage in range(layout.pp) if own[stage * layout.data_parallel]["experts"]]
    assert len({str(found["experts"]) for found in own if found["experts"]}) == len(with_experts) * layout.ep
    assert sum(found["state"] for found in own) == state
    for stage in range(layout.pp):
        states = [found["state"] for found in own[stage * layout.data_parallel :][: layout.data_parallel]]
        assert max(states) < 2 * sum(states) / len(states)
    assert {place for found in own for place in found["buffers"]} == ({"meta"} if layout.pp > 1 else set())


def check_maxima(folder: Path, name: str, steps: int) -> None:
    """QK-Clip's maxima of all layers and heads are those of all ranks after one reduction a step."""
    own = [torch.load(folder / f"{name}.{rank}.pt")["maxima"] for rank in range(layout_of(name)[0].ranks)]
    assert {len(found) for found in own} == {steps}
    for reductions in zip(*own, strict=True):
        largest = torch.stack([before for before, _ in reductions]).amax(0)
        assert largest.shape == (CONFIG.num_hidden_layers, CONFIG.num_attention_heads)
        assert largest.isfinite().all()
        assert all(torch.equal(after, largest) for _, after in reductions)
        assert any(not torch.equal(before, largest) for before, _ in reductions)


@pytest.mark.parametrize(("ranks", "name"), [pytest.param(*each, marks=many(each[0])) for each in ALL])
def test_ranks_make_the_steps_of_one(
    trained: Callable[[int], Path], ranks: int, name: str, reference: dict[str, Any]
) -> None:
    check(trained(ranks), name, reference)
    check_ranks(trained(ranks), name, reference["state"])
    check_files(trained(ranks), name)
    check_maxima(trained(ranks), name, len(reference["reports"]))


@pytest.mark.parametrize(("name", "tolerance"), [(STORED[0], 1e-9), (STORED[1], 1e-9), (STORED[2], 2**-8)])
def test_ranks_with_narrower_numbers_follow_one_process_that_has_them(
    trained: Callable[[int], Path], name: str, tolerance: float
) -> None:
    """FP8 storage rounds a row the same wherever it is; sums of float32 gradients differ in their last bits."""
    reference = alone(torch.float32 if "narrow" in name else torch.float64, 5, [name.split(".")[-1]])
    found = torch.load(trained(2) / f"{name}.pt")
    for parameter, weight in reference["weights"].items():
        torch.testing.assert_close(found["weights"][parameter], weight, rtol=tolerance, atol=tolerance)
    narrow = {weight.dtype for parameter, weight in found["weights"].items() if parameter.endswith("_proj.weight")}
    assert narrow == {torch.bfloat16 if "narrow" in name else torch.float64}
    exact = alone(torch.float64, 5)["reports"]
    losses = [(ours["loss"], theirs["loss"]) for ours, theirs in zip(found["reports"], exact, strict=True)]
    assert all(ours == pytest.approx(theirs, rel=0.02) for ours, theirs in losses)
    assert losses[-1][0] != losses[-1][1]


@pytest.mark.parametrize("ranks", [pytest.param(ranks, marks=many(ranks)) for ranks in SINGLE])
def test_losses_in_float32_follow_those_of_one_process(
    trained: Callable[[int], Path], ranks: int, reference32: dict[str, Any]
) -> None:
    """With the same expert choices; a router that runs freely may flip, which is printed and not bounded."""
    deviations = []
    for name in SINGLE[ranks]:
        reports = torch.load(trained(ranks) / f"{name}.pt")["reports"]
        pairs = zip(reports, reference32["reports"], strict=True)
        deviations.append(max(abs(ours["loss"] / theirs["loss"] - 1) for ours, theirs in pairs))
        own = [torch.load(trained(ranks) / f"{name}.{rank}.pt") for rank in range(ranks)]
        flips, choices = (sum(found[key] for found in own) for key in ("flips", "choices"))
        print(f"{name}: losses within {deviations[-1]:.1e}, flips {flips} of {choices} tokens")
    assert deviations[0] <= 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_bad_layouts_and_ranks_that_disagree_are_refused_by_every_rank(
    trained: Callable[[int], Path], name: str
) -> None:
    assert [(trained(2) / f"{name}.{rank}.txt").read_text() for rank in (0, 1)] == [REFUSED[name]] * 2
