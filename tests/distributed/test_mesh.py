"""Layouts that a number of ranks can or cannot train by."""

from dataclasses import replace

import pytest

from k2.distributed.mesh import problem_of
from k2.planner.layout import Layout
from tests.training.small import MODEL


@pytest.mark.parametrize(
    ("layout", "ranks", "batch_tokens", "expected"),
    [
        (Layout(ep=2, dp=3), 6, 192, None),
        (Layout(pp=2, ep=2, dp=2), 8, 128, None),
        (Layout(ep=3), 3, 192, "ep=3 does not divide n_routed_experts=4; the nearest that works is pp=1, ep=1, dp=3"),
        (Layout(ep=6), 6, 192, "ep=6 does not divide n_routed_experts=4; the nearest that works is pp=1, ep=2, dp=3"),
        (Layout(ep=2, dp=2), 8, 256,
         "pp=1 x ep=2 x dp=2 are 4 ranks, but 8 were started; the nearest that works is pp=1, ep=2, dp=4"),
        (Layout(pp=4, virtual_stages=2), 4, 192,
         "pp=4 x virtual_stages=2 exceed 2 layers; the nearest that works is pp=2, ep=1, dp=2"),
        (Layout(ep=2, dp=2), 4, 192,
         "batch_tokens=192 is no multiple of ep x dp x micro_batch_tokens = 2 x 2 x 32 = 128;"
         " the nearest that works is pp=2, ep=2, dp=1"),
        (Layout(dp=5), 5, 96, "batch_tokens=96 is no multiple of ep x dp x micro_batch_tokens = 1 x 5 x 32 = 160;"
                              " the nearest that works is pp=1, ep=1, dp=3 on 3 ranks"),
        (Layout(dp=2), 2, 40, "batch_tokens=40 is no multiple of ep x dp x micro_batch_tokens = 1 x 2 x 32 = 64;"
                              " no number of ranks has a layout that works"),
    ],
)  # fmt: skip
def test_layouts(layout: Layout, ranks: int, batch_tokens: int, expected: str | None) -> None:
    assert problem_of(replace(layout, micro_batch_tokens=32), MODEL, batch_tokens, 16, ranks) == expected
