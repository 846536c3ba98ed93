"""Layouts that a number of ranks can or cannot train by."""

import pytest

from k2.distributed.mesh import problem_of
from k2.planner.layout import Layout
from tests.training.small import MODEL


@pytest.mark.parametrize(
    ("ep", "dp", "ranks", "batch_tokens", "expected"),
    [
        (2, 3, 6, 192, None),
        (3, 1, 3, 192, "ep=3 does not divide n_routed_experts=4; the nearest that works is pp=1, ep=1, dp=3"),
        (6, 1, 6, 192, "ep=6 does not divide n_routed_experts=4; the nearest that works is pp=1, ep=2, dp=3"),
        (2, 2, 8, 256, "ep=2 x dp=2 are 4 ranks, but 8 were started; the nearest that works is pp=1, ep=2, dp=4"),
        (2, 2, 4, 192, "batch_tokens=192 is no multiple of ep x dp x micro_batch_tokens = 2 x 2 x 32 = 128;"
                       " 4 ranks have no layout that works"),
    ],
)  # fmt: skip
def test_layouts(ep: int, dp: int, ranks: int, batch_tokens: int, expected: str | None) -> None:
    layout = Layout(ep=ep, dp=dp, micro_batch_tokens=32)
    assert problem_of(layout, MODEL, batch_tokens, 16, ranks) == expected
