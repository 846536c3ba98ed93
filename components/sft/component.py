"""KFP component of the stage `sft`."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def sft(
    config: str,
    model: Input[Model],
    trajectories: Input[Dataset],
    artifact: Output[Model],
    metrics: Output[Metrics],
) -> None:
    """Fine-tune on verifiable instructions and accepted trajectories."""
    from k2.execution.component import run_component

    run_component("sft", config, artifact, metrics, model=model, trajectories=trajectories)
