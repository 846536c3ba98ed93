"""KFP component of the stage `synthesize`."""

from kfp import dsl
from kfp.dsl import Dataset, Metrics, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def synthesize(config: str, artifact: Output[Dataset], metrics: Output[Metrics]) -> None:
    """Synthesise tools, agents, tasks and judged multi-turn trajectories."""
    from k2.execution.component import run_component

    run_component("synthesize", config, artifact, metrics)
