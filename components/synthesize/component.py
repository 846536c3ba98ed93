"""KFP component of the stage `synthesize`."""

from kfp import dsl
from kfp.dsl import ClassificationMetrics, Dataset, Metrics, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def synthesize(
    config: str, artifact: Output[Dataset], metrics: Output[Metrics], judge: Output[ClassificationMetrics]
) -> None:
    """Synthesise tools, agents, tasks and judged multi-turn trajectories."""
    from k2.execution.component import run_component
    from k2.execution.views import show_judgement

    show_judgement(run_component("synthesize", config, artifact, metrics), judge)
