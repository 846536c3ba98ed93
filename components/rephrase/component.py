"""KFP component of the stage `rephrase`."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def rephrase(config: str, documents: Input[Dataset], artifact: Output[Dataset], metrics: Output[Metrics]) -> None:
    """Rewrite knowledge and mathematics with a language model and keep what is faithful."""
    from k2.execution.component import run_component

    run_component("rephrase", config, artifact, metrics, documents=documents)
