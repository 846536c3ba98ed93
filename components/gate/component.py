"""KFP component of the stage `gate`."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Metrics, Model, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def gate(
    config: str,
    evaluation: Input[Artifact],
    export: Input[Model],
    artifact: Output[Artifact],
    metrics: Output[Metrics],
) -> None:
    """Decide whether the candidate beats the champion by the configured rule."""
    from k2.execution.component import run_component

    run_component("gate", config, artifact, metrics, evaluation=evaluation, export=export)
