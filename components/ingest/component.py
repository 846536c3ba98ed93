"""KFP component of the stage `ingest`."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def ingest(config: str, corpus: Input[Dataset], artifact: Output[Dataset], metrics: Output[Metrics]) -> None:
    """Normalise, deduplicate, filter and classify documents; split held-out documents away."""
    from k2.execution.component import run_component

    run_component("ingest", config, artifact, metrics, corpus=corpus)
