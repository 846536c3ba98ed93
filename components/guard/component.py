"""KFP component that decides whether a scheduled run has anything to do, and the money for it."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl import Markdown, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def guard(
    config: str, only_if_new: bool, budget: float, budget_days: int, costs: str, verdict: Output[Markdown]
) -> NamedTuple("Decision", [("proceed", bool), ("reason", str)]):
    """Say whether the run goes on, and why; `costs` is JSON, stage -> cost of an hour."""
    from pathlib import Path

    from k2.platform.guard import guard_component

    proceed, reason = guard_component(config, only_if_new, budget, budget_days, costs)
    Path(verdict.path).write_text(reason)
    return (proceed, reason)
