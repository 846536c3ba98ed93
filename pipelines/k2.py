"""The whole recipe of Kimi K2, from a corpus to a promoted INT4 model."""

from kfp import dsl
from kfp.dsl.pipeline_channel import PipelineParameterChannel

from components.configure.component import configure
from components.corpus.component import corpus
from components.evaluate.component import evaluate
from components.export.component import export
from components.gate.component import gate
from components.ingest.component import ingest
from components.pretrain.component import pretrain
from components.promote.component import promote
from components.quantize.component import quantize
from components.rephrase.component import rephrase
from components.report.component import report
from components.rl.component import rl
from components.sft.component import sft
from components.synthesize.component import synthesize
from components.tokenize.component import tokenize
from pipelines.placement import place


def recipe(config: PipelineParameterChannel) -> None:
    """The stages in their order, from one validated configuration."""
    # Data.
    raw = place(corpus(config=config), "corpus").outputs["artifact"]
    clean = place(ingest(config=config, corpus=raw), "ingest").outputs["artifact"]
    diverse = place(rephrase(config=config, documents=clean), "rephrase").outputs["artifact"]
    tokens = place(tokenize(config=config, documents=diverse, heldout=clean), "tokenize").outputs["artifact"]

    # Pretraining, beside the synthesis of agentic data.
    base = place(pretrain(config=config, tokens=tokens), "pretrain").outputs["artifact"]
    agentic = place(synthesize(config=config), "synthesize").outputs["artifact"]

    # Post-training.
    tuned = place(sft(config=config, model=base, trajectories=agentic), "sft").outputs["artifact"]
    policy = place(rl(config=config, model=tuned, trajectories=agentic), "rl").outputs["artifact"]
    small = place(quantize(config=config, model=policy, trajectories=agentic), "quantize").outputs["artifact"]
    served = place(export(config=config, model=policy, quantized=small), "export").outputs["artifact"]

    # Judgement.
    scores = place(
        evaluate(config=config, base=base, sft=tuned, rl=policy, export=served, tokens=tokens, trajectories=agentic),
        "evaluate",
    ).outputs["artifact"]
    decision = place(gate(config=config, evaluation=scores, export=served), "gate").outputs["artifact"]
    place(promote(config=config, decision=decision, export=served), "promote")


@dsl.pipeline(
    name="k2",
    description="Corpus to an evaluated, INT4, servable agentic model by the recipe of Kimi K2.",
)
def k2(preset: str = "tiny", overrides: str = "", run: str = "") -> None:
    """Train a model by the recipe of Kimi K2.

    Args:
        preset: How large: nano, tiny, small, moonlight-16b or k2-1t.
        overrides: Fields that differ from the preset, as YAML, for example `pretrain: {seed: 3}`.
        run: Name of this run in the object store; empty takes the name Kubeflow gave it.
    """
    job = dsl.PIPELINE_JOB_NAME_PLACEHOLDER
    finish = place(report(preset=preset, run=run, job=job), "report")
    with dsl.ExitHandler(finish, name="recipe"):
        config = place(configure(preset=preset, overrides=overrides, run=run, job=job), "configure").output
        recipe(config)
