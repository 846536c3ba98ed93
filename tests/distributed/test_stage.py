"""What `k2.distributed.stage` relies on in torch; that its buffers go again is looked at on real ranks."""

import inspect

import pytest
import torch
from torch.distributed.pipelining import PipelineStage

from k2.distributed.stage import Stage

OVERRIDDEN = {
    "_setup_forward_recv_info": ["self", "num_microbatches", "has_backward"],
    "_setup_backward_recv_info": ["self", "num_microbatches"],
    "get_fwd_recv_ops": ["self", "fwd_chunk_id"],
    "get_bwd_recv_ops": ["self", "bwd_chunk_id"],
    "forward_one_chunk": ["self", "fwd_chunk_id", "args", "kwargs", "save_forward_output"],
    "backward_one_chunk": ["self", "bwd_chunk_id", "loss", "full_backward", "last_backward"],
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_torch_has_what_is_overridden(name: str) -> None:
    changed = (
        f"torch {torch.__version__} changed PipelineStage.{name}: look at k2.distributed.stage, which overrides it"
    )
    method = getattr(PipelineStage, name, None)
    assert method is not None, changed
    assert list(inspect.signature(method).parameters) == OVERRIDDEN[name], changed
    assert name in vars(Stage)


def test_nothing_else_is_overridden() -> None:
    own = {name for name, value in vars(Stage).items() if inspect.isfunction(value)}
    assert {name for name in own if hasattr(PipelineStage, name)} == set(OVERRIDDEN)
