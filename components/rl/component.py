"""KFP component of the stage `rl`."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def rl(
    config: str,
    model: Input[Model],
    trajectories: Input[Dataset],
    artifact: Output[Model],
    metrics: Output[Metrics],
) -> None:
    """Reinforcement learning from verifiable and rubric rewards."""
    from k2.execution.component import run_component

    run_component("rl", config, artifact, metrics, model=model, trajectories=trajectories)
