"""Weights arrive as they were, from any layout into any other, and the memory of who rests is free."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from k2.distributed.handover import lent, memory_of
from k2.distributed.pieces import Piece, weights
from k2.distributed.sync import WeightSync
from k2.errors import StageError
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.store.embedded import free_ports
from tests.distributed.program import CONFIG
from tests.distributed.saving import started, steps
from tests.distributed.syncing import COLUMNS, ROWS
from tests.distributed.test_saving import ROOT, launch
from tests.training.small import digest

TWO = ["1.2.1", "2.1.1", "2.1.1:ab"]
FOUR = ["1.2.2", "2.2.1:aabb"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sync")
    assert launch(2, folder, TWO, "syncing.py") == 0, (folder / "stderr").read_text()
    return folder


def arrived(folder: Path, task: str, ranks: int) -> None:
    """Every rank has the second version of what it wants, and heard of the damage to the third."""
    parameters = {tensor.name: tensor.parameter for tensor in logical_tensors(CONFIG)}
    for rank in range(ranks):
        found = torch.load(folder / f"{task}.{rank}.pt")
        assert found["version"] == 2
        for key, tensor in found["expected"].items():
            kind = torch.bfloat16 if tensor.dim() > 1 else tensor.dtype
            assert torch.equal(found["weights"][key], tensor.to(kind).to(found["weights"][key].dtype)), key
        rows, columns = found["parts"]
        whole = found["expected"][parameters[ROWS]].to(torch.bfloat16)
        assert torch.equal(rows, whole.chunk(ranks)[rank])
        whole = found["expected"][parameters[COLUMNS]].to(torch.bfloat16)
        assert torch.equal(columns, whole.chunk(ranks, 1)[rank])
        size = sum(t.numel() * (2 if t.dim() > 1 else 8) for t in found["expected"].values())
        assert size <= found["bytes"] <= 1.1 * size
        assert found["error"] == "weight synchronisation: bucket 1 of version 3 came damaged to rank 0"


@pytest.mark.parametrize("task", TWO)
def test_two_ranks_get_what_they_want(two: Path, task: str) -> None:
    arrived(two, task, 2)


@pytest.mark.slow
def test_four_ranks_on_one_host_and_on_two(tmp_path: Path) -> None:
    assert launch(4, tmp_path, FOUR, "syncing.py") == 0, (tmp_path / "stderr").read_text()
    for task in FOUR:
        arrived(tmp_path, task, 4)


def shared_memory() -> set[str]:
    """Processes that share any."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            text = maps.read_text()
            found |= {maps.parent.name} if "memfd:k2-board" in text or "/dev/shm/torch" in text else set()
    return found


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_leaves_the_old_version_in_use_and_no_memory(victim: int) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "3"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    command = [sys.executable, str(ROOT / "tests/distributed/losing.py"), str(victim)]
    before, files = shared_memory(), set(Path("/dev/shm").iterdir())
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    said = [rank.communicate(timeout=60)[0].strip() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [-9 if number == victim else 0 for number in range(3)]
    assert said[2] == "1 0 True"
    assert said[1 - victim] == ("1 0 True" if victim == 0 else "None 0 False")
    assert shared_memory() <= before
    assert set(Path("/dev/shm").iterdir()) <= files


@pytest.mark.parametrize("limit", [100, 1 << 20])
def test_within_one_process(limit: int) -> None:
    training, inference = (Transformer(CONFIG).initialize(seed) for seed in (1, 2))
    training.layers["1"].mlp.gate.e_score_correction_bias += 1
    sync = WeightSync(weights(training), weights(inference), limit=limit)
    assert sync.version is None
    sync.send(7)
    assert sync.version == 7
    for key, tensor in inference.state_dict().items():
        assert torch.equal(tensor, training.state_dict()[key])


def test_what_nobody_sends_is_named() -> None:
    target = Piece("weight/x", torch.zeros(4), (4,))
    with pytest.raises(StageError, match="nobody sends all of weight/x"):
        WeightSync([Piece("weight/x", torch.zeros(3), (4,))], [target])


def test_training_and_inference_take_turns(tmp_path: Path) -> None:
    """Training gives its memory away while inference runs on the new weights, and goes on to the same bytes."""
    straight, source, _ = started(None)
    steps(straight, source, None, 3)
    state, source, _ = started(None)
    inference = Transformer(CONFIG)
    sync = WeightSync(weights(state.model), weights(inference))
    for until in (1, 2, 3):
        steps(state, source, None, until)
        sync.send(until)
        held = memory_of(state)
        size = sum(
            tensor.untyped_storage().nbytes() for tensor in {t.untyped_storage()._cdata: t for t in held}.values()
        )
        with lent(held, tmp_path) as freed:
            assert freed == size > sum(t.nbytes for t in state.model.parameters()) * 2
            assert all(tensor.untyped_storage().nbytes() == 0 for tensor in held)
            with torch.no_grad():
                output, _ = inference(torch.arange(12)[None])
        expected, _ = state.model(torch.arange(12)[None])
        torch.testing.assert_close(output, expected.float(), rtol=1e-4, atol=1e-5)
    assert digest(state) == digest(straight)


def test_memory_is_given_back_when_inference_fails() -> None:
    held = torch.arange(10.0)
    view = held[3:]
    with pytest.raises(RuntimeError, match="inference failed"):
        _fail(held)
    assert view.tolist() == list(range(3, 10))


def _fail(held: torch.Tensor) -> None:
    with lent([held, held[3:]]) as freed:
        assert freed == 40
        assert held.untyped_storage().nbytes() == 0
        raise RuntimeError("inference failed")
