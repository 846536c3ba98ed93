"""KFP component of the stage `quantize`."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def quantize(
    config: str,
    model: Input[Model],
    trajectories: Input[Dataset],
    artifact: Output[Model],
    metrics: Output[Metrics],
) -> None:
    """INT4 quantisation-aware training of the routed experts."""
    from k2.execution.component import run_component

    run_component("quantize", config, artifact, metrics, model=model, trajectories=trajectories)
