"""The least time each kernel can take on an H100, and how many of its programs one multiprocessor holds.

`python -m k2.kernels.roofline` prints the tables of docs/kernels.md; with a path it writes them between the page's
markers. Everything follows from the launches' sizes, the tiles and the committed budgets; nothing was measured.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from k2.kernels.budgets import ARCHITECTURES, Rows, committed, launches
from k2.kernels.launch import Launch


@dataclass(frozen=True)
class Gpu:
    """Peaks of a GPU, and what one of its multiprocessors has; FLOPs and bytes per second."""

    name: str
    tensor_flops: float
    vector_flops: float
    memory: float
    processors: int
    registers: int
    shared_bytes: int
    warps: int


H100 = Gpu("H100 SXM", 989.4e12, 66.9e12, 3.35e12, 132, 65536, 228 * 1024, 64)
"""Dense bfloat16 and float32 peaks and HBM3 bandwidth of NVIDIA's data sheet; limits of compute capability 9.0."""

WARP = 32
REGISTER_UNIT = 8
"""Registers of a thread are given out in units of eight."""
RESERVED_SHARED_BYTES = 1024
"""Of every program, by the CUDA runtime."""


@dataclass(frozen=True)
class Roofline:
    """What one launch could reach.

    floor_s: the larger of the time to compute and the time to move everything once.
    bound: which of the two.
    intensity: FLOPs per byte of the whole launch. tile_intensity: of one step of the inner loop.
    resident: programs on one multiprocessor. occupancy: its share of warps in use. waves: rounds of the grid.
    """

    floor_s: float
    bound: str
    intensity: float
    tile_intensity: float
    resident: int
    occupancy: float
    waves: float


def roofline(launch: Launch, rows: Rows, gpu: Gpu = H100) -> Roofline:
    """Of the sm_90 tile."""
    work, row = launch.work, rows[f"{launch.name} sm_90"]
    compute_s = work.flops / (gpu.tensor_flops if launch.matrix else gpu.vector_flops)
    memory_s = work.bytes / gpu.memory
    registers = -(-row["registers"] // REGISTER_UNIT) * REGISTER_UNIT * WARP * row["warps"]
    resident = min(
        gpu.registers // registers,
        gpu.shared_bytes // (row["shared_bytes"] + RESERVED_SHARED_BYTES),
        gpu.warps // row["warps"],
    )
    return Roofline(
        max(compute_s, memory_s), "compute" if compute_s > memory_s else "memory",
        work.flops / work.bytes, work.tile_flops / work.tile_bytes,
        resident, resident * row["warps"] / gpu.warps, work.programs / (gpu.processors * resident),
    )  # fmt: skip


def roofline_table() -> str:
    """One line per launch, in Markdown."""
    rows = committed()
    lines = [
        "| kernel | size | GFLOP | GB | FLOP/B | FLOP/B of a tile | floor, µs | bound by | programs per SM | occupancy "
        "| waves |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for launch in launches():
        r, work = roofline(launch, rows), launch.work
        lines.append(
            f"| {launch.name} | {launch.size} | {work.flops / 1e9:.4g} | {work.bytes / 1e9:.3g} | {r.intensity:.3g} "
            f"| {r.tile_intensity:.3g} | {r.floor_s * 1e6:.4g} | {r.bound} | {r.resident} | {r.occupancy:.0%} "
            f"| {r.waves:.3g} |"
        )
    return "\n".join(lines)


def budget_table() -> str:
    """One line per launch and architecture, in Markdown."""
    rows = committed()
    lines = [
        "| kernel | GPU | tile | warps, stages | registers | spills, B | shared, B | matrix instructions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for launch in launches():
        for arch in ARCHITECTURES:
            row, tile = rows[f"{launch.name} sm_{arch}"], launch.tile(arch)
            sizes = " ".join(f"{name}={value}" for name, value in tile.sizes.items())
            matrix = ", ".join(f"{count} {name}" for name, count in row["tensor_core"].items())
            lines.append(
                f"| {launch.name} | sm_{arch} | {sizes} | {row['warps']}, {row['stages']} | {row['registers']} "
                f"| {row['spill_bytes']} | {row['shared_bytes']} | {matrix or '-'} |"
            )
    return "\n".join(lines)


def filled(page: str) -> str:
    """A page with the tables between its `<!-- name -->` and `<!-- /name -->` lines."""
    for name, table in (("budgets", budget_table()), ("roofline", roofline_table())):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        page = re.sub(pattern, rf"\g<1>{table}\n\g<2>", page, flags=re.DOTALL)
    return page


def main(arguments: list[str] | None = None) -> None:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(prog="python -m k2.kernels.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("page", nargs="?", type=Path, help="a Markdown file to write the tables into")
    page = parser.parse_args(arguments).page
    if page:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.stdout.write(f"{budget_table()}\n\n{roofline_table()}\n")


if __name__ == "__main__":
    main()
