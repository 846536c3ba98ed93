"""KFP component of the stage `gate`."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Markdown, Metrics, Model, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def gate(
    config: str,
    evaluation: Input[Artifact],
    export: Input[Model],
    artifact: Output[Artifact],
    metrics: Output[Metrics],
    decision: Output[Markdown],
) -> None:
    """Decide whether the candidate beats the champion by the configured rule."""
    from k2.execution.component import run_component
    from k2.execution.views import show_decision

    show_decision(run_component("gate", config, artifact, metrics, evaluation=evaluation, export=export), decision)
