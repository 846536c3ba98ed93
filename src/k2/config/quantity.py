"""Kubernetes quantities: 500m, 2, 4Gi."""

import re

_FORM = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_UNITS |= {f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTP", start=1)}


def amount(quantity: str) -> float:
    """A quantity in base units: cores, bytes, pieces.

    Raises:
        ValueError: it is none, or nothing.
    """
    match = _FORM.fullmatch(quantity)
    value = float(match[1]) * _UNITS[match[2] or ""] if match else 0.0
    if value <= 0:
        raise ValueError(f"{quantity!r} is no amount; write it as 500m, 2 or 4Gi")
    return value


def mebibytes(size: float) -> str:
    """Bytes as a quantity, rounded up to whole MiB."""
    return f"{-int(-size // 2**20)}Mi"
