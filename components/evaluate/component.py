"""KFP component of the stage `evaluate`."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def evaluate(
    config: str,
    base: Input[Model],
    sft: Input[Model],
    rl: Input[Model],
    export: Input[Model],
    tokens: Input[Dataset],
    trajectories: Input[Dataset],
    artifact: Output[Artifact],
    metrics: Output[Metrics],
) -> None:
    """Score base, SFT, RL and INT4 models side by side on held-out text and unseen tasks."""
    from k2.execution.component import run_component

    run_component(
        "evaluate",
        config,
        artifact,
        metrics,
        base=base,
        sft=sft,
        rl=rl,
        export=export,
        tokens=tokens,
        trajectories=trajectories,
    )
