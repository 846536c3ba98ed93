"""KFP component of the stage `promote`."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Metrics, Model, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def promote(
    config: str,
    decision: Input[Artifact],
    export: Input[Model],
    artifact: Output[Artifact],
    metrics: Output[Metrics],
) -> None:
    """Move the champion alias when the gate said so."""
    from k2.execution.component import run_component

    run_component("promote", config, artifact, metrics, decision=decision, export=export)
