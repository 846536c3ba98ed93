"""KFP component of the stage `pretrain`."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def pretrain(config: str, tokens: Input[Dataset], artifact: Output[Model], metrics: Output[Metrics]) -> None:
    """Pretrain the model with MuonClip, annealing and context extension included."""
    from k2.execution.component import run_component

    run_component("pretrain", config, artifact, metrics, tokens=tokens)
