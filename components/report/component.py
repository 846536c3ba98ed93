"""KFP component of the exit handler: it reports on a run, also on one that failed."""

from kfp import dsl
from kfp.dsl import HTML, Metrics, Output, PipelineTaskFinalStatus


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def report(
    preset: str,
    run: str,
    job: str,
    status: PipelineTaskFinalStatus,
    page: Output[HTML],
    metrics: Output[Metrics],
) -> None:
    """Write `summary.json` and `report.html` of the run to the object store."""
    from k2.execution.component import run_report

    run_report(preset, run or job, status.state, page, metrics)
