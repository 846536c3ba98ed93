"""The committed table of what every kernel takes on every architecture: `python -m k2.kernels.budgets`.

Without arguments it compiles everything and writes the table; with `--check` it compares instead, and `--arch 90`
compiles that architecture only. A row whose kernel did not change is not in doubt: `stale` tells from the kernels' own
IR, without making machine code, which rows are. `python -m k2.kernels.roofline docs/kernels.md` then writes the page.
"""

import argparse
import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from k2.kernels.aot import compile_launch, fingerprint
from k2.kernels.launch import Launch

TABLE = Path(__file__).with_name("budgets.json")
ARCHITECTURES = (80, 90, 100)
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""What one program may have at most."""
TENSOR_COLUMNS = 512
MODULES = (
    "grouped_gemm",
    "swiglu",
    "rms_norm",
    "attention",
    "linear_cross_entropy",
    "symmetric",
    "router",
    "int4",
    "fp8",
)

Rows = dict[str, dict[str, Any]]
"""Budgets by "<kernel> sm_<architecture>"."""


def launches() -> list[Launch]:
    """All launches of all kernels, in the order of MODULES."""
    return [launch for name in MODULES for launch in importlib.import_module(f"k2.kernels.{name}").LAUNCHES]


def committed() -> Rows:
    """The table as it was committed."""
    rows: Rows = json.loads(TABLE.read_text(encoding="utf-8"))["rows"]
    return rows


def measure(architectures: tuple[int, ...]) -> Rows:
    """Compile every kernel for `architectures`."""
    return {
        f"{launch.name} sm_{arch}": {
            **asdict(compile_launch(launch, arch)[0]),
            "fingerprint": fingerprint(launch, arch),
        }
        for launch in launches()
        for arch in architectures
    }


def stale() -> list[str]:
    """Rows of the committed table whose kernel, sizes or compiler are others by now, and rows that are missing."""
    table = committed()
    expected = {f"{launch.name} sm_{arch}": (launch, arch) for launch in launches() for arch in ARCHITECTURES}
    gone = sorted(table.keys() - expected.keys())
    return gone + [
        name
        for name, (launch, arch) in expected.items()
        if table.get(name, {}).get("fingerprint") != fingerprint(launch, arch)
    ]


def faults(rows: Rows) -> list[str]:
    """What no kernel may do: spill, multiply matrices without tensor cores, or take more memory than there is."""
    matrix = {launch.name for launch in launches() if launch.matrix}
    found = []
    for name, row in rows.items():
        kernel, arch = name.split()
        if row["spill_bytes"]:
            found.append(f"{name} spills {row['spill_bytes']} bytes")
        if kernel in matrix and not row["tensor_core"]:
            found.append(f"{name} uses no tensor cores")
        if row["shared_bytes"] > SHARED_BYTES[arch] or row["tensor_columns"] > TENSOR_COLUMNS:
            found.append(f"{name} does not fit")
    return found


def differences(rows: Rows) -> list[str]:
    """Rows that differ from the committed ones."""
    table = committed()
    return [f"{name}: {row} instead of {table.get(name)}" for name, row in rows.items() if table.get(name) != row]


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 1 when the table differs or a kernel breaks a rule."""
    parser = argparse.ArgumentParser(prog="python -m k2.kernels.budgets", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table and write nothing")
    parser.add_argument("--stale", action="store_true", help="name the rows that are out of date and compile nothing")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="compile for one architecture only")
    options = parser.parse_args(arguments)
    if options.stale:
        return _report([f"{name} is out of date: run python -m k2.kernels.budgets" for name in stale()])
    rows = measure((options.arch,) if options.arch else ARCHITECTURES)
    if options.check:
        table = committed()
        changed = [
            f"{name}: {row} instead of {table.get(name)}" for name, row in rows.items() if table.get(name) != row
        ]
        return _report(changed + faults(rows))
    rows = rows if not options.arch else committed() | rows
    text = json.dumps({"triton": triton.__version__, "rows": rows}, indent=1, sort_keys=True)
    TABLE.write_text(text + "\n", encoding="utf-8")
    return _report(faults(rows))


def _report(problems: list[str]) -> int:
    sys.stdout.write("".join(f"{problem}\n" for problem in problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
