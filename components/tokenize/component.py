"""KFP component of the stage `tokenize`."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def tokenize(
    config: str,
    documents: Input[Dataset],
    heldout: Input[Dataset],
    artifact: Output[Dataset],
    metrics: Output[Metrics],
) -> None:
    """Train the tokenizer, encode the documents and the held-out set."""
    from k2.execution.component import run_component

    run_component("tokenize", config, artifact, metrics, documents=documents, heldout=heldout)
