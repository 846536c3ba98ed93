"""KFP component of the stage `corpus`."""

from kfp import dsl
from kfp.dsl import Dataset, Metrics, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def corpus(config: str, artifact: Output[Dataset], metrics: Output[Metrics]) -> None:
    """Snapshot text from the environment, from files or from object storage as an immutable corpus."""
    from k2.execution.component import run_component

    run_component("corpus", config, artifact, metrics)
