"""Weights arrive as they were, from any layout into any other, and the memory of who rests is free."""

from pathlib import Path

import pytest
import torch

from k2.distributed.handover import lent, memory_of
from k2.distributed.pieces import Piece, weights
from k2.distributed.sync import WeightSync
from k2.errors import StageError
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from tests.distributed.program import CONFIG
from tests.distributed.saving import started, steps
from tests.distributed.syncing import COLUMNS, ROWS
from tests.distributed.test_saving import launch
from tests.training.small import digest

TWO = ["1.2.1", "2.1.1"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sync")
    assert launch(2, folder, TWO, "syncing.py") == 0, (folder / "stderr").read_text()
    return folder


@pytest.mark.parametrize("name", TWO)
def test_every_rank_gets_what_it_wants(two: Path, name: str) -> None:
    parameters = {tensor.name: tensor.parameter for tensor in logical_tensors(CONFIG)}
    for rank in range(2):
        found = torch.load(two / f"{name}.{rank}.pt")
        assert found["version"] == 2
        for key, tensor in found["expected"].items():
            kind = torch.bfloat16 if tensor.dim() > 1 else tensor.dtype
            assert torch.equal(found["weights"][key], tensor.to(kind).to(found["weights"][key].dtype)), key
        rows, columns = found["parts"]
        whole = found["expected"][parameters[ROWS]].to(torch.bfloat16).float()
        assert torch.equal(rows, whole.chunk(2)[rank])
        whole = found["expected"][parameters[COLUMNS]].to(torch.bfloat16).float()
        assert torch.equal(columns, whole.chunk(2, 1)[rank])
        size = sum(t.numel() * (2 if t.dim() > 1 else 8) for t in found["expected"].values())
        assert size <= found["bytes"] <= 1.1 * size


@pytest.mark.parametrize("name", TWO)
def test_a_damaged_bucket_fails_on_every_rank(two: Path, name: str) -> None:
    for rank in range(2):
        found = torch.load(two / f"{name}.{rank}.pt")
        assert found["error"] == "weight synchronisation: bucket 3 of version 3 came damaged to rank 1"
        assert found["torn"] is None


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
