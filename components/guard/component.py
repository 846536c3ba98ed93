"""KFP component that decides whether a scheduled run has anything to do, and the money for it."""

from kfp import dsl
from kfp.dsl import Markdown, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def guard(
    config: str, only_if_new: bool, budget: float, budget_days: int, costs: str, verdict: Output[Markdown]
) -> str:
    """Say whether the run goes on, yes or no; `verdict` says why, `costs` is JSON, stage -> cost of an hour."""
    from pathlib import Path

    from k2.platform.guard import guard_component

    proceed, reason = guard_component(config, only_if_new, budget, budget_days, costs)
    Path(verdict.path).write_text(reason)
    return "yes" if proceed else "no"
