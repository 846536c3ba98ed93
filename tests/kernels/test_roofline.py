"""Rooflines by hand, and the page that shows them."""

from pathlib import Path

import pytest

from k2.kernels.budgets import committed, launches
from k2.kernels.roofline import H100, filled, roofline

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
ROWS = committed()
LAUNCHES = {launch.name: launch for launch in launches()}


def test_the_page_shows_the_tables_as_they_are():
    page = PAGE.read_text(encoding="utf-8")
    assert "<!-- budgets -->" in page
    assert filled(page) == page, "run python -m k2.kernels.roofline docs/kernels.md"


def test_the_experts_product_by_hand():
    """32,768 rows of 7,168 through 24 matrices to 4,096 outputs, in bfloat16."""
    work = LAUNCHES["grouped_gemm.forward"].work
    assert work.flops == 2 * 32768 * 7168 * 4096
    assert work.bytes == 2 * (32768 * 7168 + 24 * 7168 * 4096 + 32768 * 4096)
    result = roofline(LAUNCHES["grouped_gemm.forward"], ROWS)
    assert result.bound == "compute"
    assert result.floor_s == pytest.approx(work.flops / 989.4e12)
    assert result.tile_intensity == pytest.approx(128 * 256 / (128 + 256))


def test_a_norm_is_bound_by_memory():
    result = roofline(LAUNCHES["rms_norm.forward"], ROWS)
    assert result.bound == "memory"
    assert result.floor_s == pytest.approx((4 * 4096 * 7168 + 4 * 7168) / 3.35e12)


def test_attention_counts_half_of_the_pairs():
    assert LAUNCHES["attention.forward"].work.flops == 64 * (4096**2 / 2) * 2 * (192 + 128)


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_program_fits_on_a_multiprocessor(name):
    result = roofline(LAUNCHES[name], ROWS)
    assert result.resident >= 1
    assert 0 < result.occupancy <= 1
    assert LAUNCHES[name].work.programs >= H100.processors // 2


@pytest.mark.parametrize("name", [name for name, launch in LAUNCHES.items() if launch.matrix])
def test_matrix_products_have_large_tiles(name):
    """At least 128 x 128 results of a program; attention keeps 128 queries, or 64 keys, and all of their width."""
    sizes = LAUNCHES[name].tile(90).sizes
    if name.startswith("attention"):
        assert min(sizes["BM"], sizes["BN"]) >= 64
    else:
        assert sizes["BM"] >= 128
        assert sizes.get("BN", sizes["BM"]) >= 128
