"""KFP component of the comparison that ends an ablation study."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Metrics, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def compare(
    definition: str, config: str, runs: list, artifact: Output[Dataset], page: Output[HTML], metrics: Output[Metrics]
) -> None:
    """Pool the seeds of every arm (URIs in the study's order) into a table, figures and a page."""
    from k2.ablations.component import run_compare

    run_compare(definition, config, runs, artifact, page, metrics)
