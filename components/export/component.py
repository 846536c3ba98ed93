"""KFP component of the stage `export`."""

from kfp import dsl
from kfp.dsl import Input, Metrics, Model, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def export(
    config: str,
    model: Input[Model],
    quantized: Input[Model],
    artifact: Output[Model],
    metrics: Output[Metrics],
) -> None:
    """Write Hugging Face folders in bf16 and packed INT4."""
    from k2.execution.component import run_component

    run_component("export", config, artifact, metrics, model=model, quantized=quantized)
