"""Training and inference take turns: versions, and memory that is not used twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from k2.config.optimizer import OptimizerConfig
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.rl.policy import Policy
from k2.training.state import TrainState
from tests.rl.program import SHAPE


def held(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.fixture
def state() -> TrainState:
    model = Transformer(SHAPE).initialize(0)
    return TrainState(model, MuonClip(model.named_parameters(), logical_tensors(SHAPE), OptimizerConfig()))


def test_a_turn_has_the_present_weights_and_their_version(state: TrainState) -> None:
    policy = Policy(state)
    for version in (3, 4):
        state.step = version
        with torch.no_grad():
            state.model.lm_head.weight.add_(1)
        expected = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
        with policy.turn() as engine:
            assert policy.version == version
            assert all(torch.equal(tensor, expected[name]) for name, tensor in engine.model.state_dict().items())
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.model.state_dict().items())


def test_who_rests_holds_no_memory(state: TrainState) -> None:
    policy = Policy(state)
    momentum = [tensor for name, tensor in state.optimizer.state_dict().items() if name.startswith("momentum")]
    trained = [*state.model.state_dict().values(), *momentum]
    size = held(trained)
    with policy.turn() as engine:
        inference = list(engine.model.state_dict().values())
        resting, working = held(trained), held(inference)
    assert resting == 0 < working
    assert (held(trained), held(inference)) == (size, 0)
    assert not hasattr(engine, "prepared")


def test_peaks_of_both_phases_do_not_add_up() -> None:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = f"{root / 'src'}:{root}"
    command = [sys.executable, str(Path(__file__).with_name("turns.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(done.stdout)
    print(found)
    assert found["beside"] < 1.1 * found["alone"]
    assert found["turn"] < found["alone"] + 0.5 * found["weights"]
    assert found["turn"] < found["held"] + 1.5 * found["weights"]
