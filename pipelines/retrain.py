"""The recipe behind guards, for schedules: with nothing new to learn from, or no money, a run ends green and early."""

from kfp import dsl

from components.configure.component import configure
from components.guard.component import guard
from components.report.component import report
from pipelines.k2 import recipe
from pipelines.placement import place, stage_costs


@dsl.pipeline(
    name="k2-retrain",
    description="The recipe of Kimi K2 when there is something new to train on and money for it.",
)
def retrain(
    preset: str = "tiny",
    overrides: str = "",
    run: str = "",
    only_if_new: bool = True,
    budget: float = 0.0,
    budget_days: int = 30,
) -> None:
    """Train again by the recipe of Kimi K2, unless that would make nothing new or cost too much.

    Args:
        preset: How large: nano, tiny, small, moonlight-16b or k2-1t.
        overrides: Fields that differ from the preset, as YAML, for example `corpus: {paths: [s3://bucket/text]}`.
        run: Name of this run in the object store; empty takes the name Kubeflow gave it.
        only_if_new: End at once when data, configuration and code are those of a result that exists.
        budget: End at once when the runs of the last days, and one more like the last, cost more; 0 is no limit.
        budget_days: How many days back the budget looks.
    """
    job = dsl.PIPELINE_JOB_NAME_PLACEHOLDER
    finish = place(report(preset=preset, run=run, job=job), "report")
    with dsl.ExitHandler(finish, name="recipe"):
        config = place(configure(preset=preset, overrides=overrides, run=run, job=job), "configure").output
        decision = place(
            guard(config=config, only_if_new=only_if_new, budget=budget, budget_days=budget_days, costs=stage_costs()),
            "guard",
        )
        # Text, and the only output: kfp's local runner takes everything else for false.
        with dsl.If(decision.outputs["Output"] == "yes", name="Train and judge"):
            recipe(config)
