"""The partition of a model's parameters, for people and programs. Torch-free."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from k2.config.model import ModelConfig
from k2.config.optimizer import OptimizerConfig
from k2.model.layout import LogicalTensor, logical_tensors

RULES = {
    "muon": "Muon, each matrix alone",
    "adamw": "AdamW",
    "none": "expert balancing, from the token counts of a step",
}


def summarize(model: ModelConfig, optimizer: OptimizerConfig) -> dict[str, Any]:
    """Every logical tensor in exactly one row.

    Returns:
        `rows` (group, rule, component, shape, tensors, values, QK-Clip's rule) and `totals` by group.
    """
    kinds: dict[tuple[Any, ...], list[LogicalTensor]] = defaultdict(list)
    for tensor in logical_tensors(model):
        group = "adamw" if tensor.group == "muon" and optimizer.matrices == "adamw" else tensor.group
        kinds[(group, tensor.component, tensor.shape, _clipping(tensor))].append(tensor)
    rows = [
        {
            "group": group,
            "rule": RULES[group],
            "component": component,
            "shape": list(shape),
            "tensors": len(tensors),
            "values": sum(tensor.size for tensor in tensors),
            "qk_clip": clipping,
        }
        for (group, component, shape, clipping), tensors in sorted(kinds.items(), key=lambda item: _order(item[0]))
    ]
    return {"rows": rows, "totals": {group: _total(rows, group) for group in RULES}}


def _order(kind: tuple[Any, ...]) -> tuple[int, str, Any]:
    group, component, shape, _ = kind
    return list(RULES).index(group), component, shape


def _clipping(tensor: LogicalTensor) -> str | None:
    rows = tensor.head_rows
    if rows is None:
        return None
    parts = ((rows.content, "sqrt(gamma)"), (rows.rotary, "gamma"), (rows.per_head - rows.content - rows.rotary, "1"))
    return f"{rows.heads} heads of rows " + ", ".join(f"{count} by {factor}" for count, factor in parts if count)


def _total(rows: list[dict[str, Any]], group: str) -> dict[str, int]:
    mine = [row for row in rows if row["group"] == group]
    return {"tensors": sum(row["tensors"] for row in mine), "values": sum(row["values"] for row in mine)}


def table(summary: Mapping[str, Any]) -> str:
    """The summary in columns."""
    lines = [("group", "matrix", "shape", "tensors", "values", "QK-Clip")]
    for row in summary["rows"]:
        shape = " x ".join(map(str, row["shape"]))
        numbers = f"{row['tensors']:,}", f"{row['values']:,}"
        lines.append((row["group"], row["component"], shape, *numbers, row["qk_clip"] or ""))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    body = ["  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[5]]) for line in lines]
    totals = [
        f"{group}: {RULES[group]}; {total['tensors']:,} tensors, {total['values']:,} values"
        for group, total in summary["totals"].items()
    ]
    return "\n".join([line.rstrip() for line in body] + ["", *totals])
