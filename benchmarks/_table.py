"""Rows of results, and the options every benchmark has."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import torch

Row = dict[str, Any]


def row(claim: str, peer: str, values: Sequence[float], target: float | None, better: str = "higher") -> Row:
    """One claim: the median and the extremes of the rounds' ratios."""
    spread = {"ratio": median(values), "low": min(values), "high": max(values)}
    rounded = {name: round(value, 4) for name, value in spread.items()}
    return {"claim": claim, "peer": peer, **rounded, "target": target, "better": better}


def run(about: str | None, rows: Callable[[int], Iterable[Row]], rounds: int) -> None:
    """Read `--rounds`, `--threads` and `--json`, and print each row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"measurements per side (default {rounds})")
    parser.add_argument("--threads", type=int, default=1, help="of torch; two spinning ones lose on a busy machine")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for each in rows(arguments.rounds):
        print(json.dumps(each) if arguments.json else text(each), flush=True)


def text(each: Row) -> str:
    """A row for people."""
    sign = ">=" if each["better"] == "higher" else "<="
    target = "" if each["target"] is None else f"  target {sign} {each['target']:g}, {'met' if met(each) else 'missed'}"
    spread = f"{each['ratio']:.3g} ({each['low']:.3g}-{each['high']:.3g})"
    return f"{each['claim']}\n    {spread} against {each['peer']}{target}"


def met(each: Row) -> bool:
    """Whether the median reaches the target."""
    return bool(each["ratio"] >= each["target"] if each["better"] == "higher" else each["ratio"] <= each["target"])
