"""KFP component of one training in an ablation study."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Metrics, Model, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def arm(
    definition: str,
    config: str,
    label: str,
    fields: str,
    tune: str,
    candidates: list,
    start: Input[Artifact],
    artifact: Output[Model],
    metrics: Output[Metrics],
) -> str:
    """Train with the arm's fields (JSON), the field `tune` taken from the best candidate; returns the URI."""
    from k2.ablations.component import run_arm

    return run_arm(definition, config, label, fields, tune, candidates, start, artifact, metrics)
