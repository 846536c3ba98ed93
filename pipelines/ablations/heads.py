"""Twice the attention heads: what do they gain at equal tokens, and what does a token cost? (K2 report, section 2.3)

`k2 run --pipeline ablations/heads` runs it on this machine.

The paper finds 0.5 to 1.2% lower validation loss at equal tokens when heads double, and 83% more inference FLOPs at
128k tokens, and stays with as many heads as layers. All else is fixed here too: hidden size, head width, experts. The
learning rate is constant after warm-up.
"""

from k2.config.ablations import ArmConfig, StudyConfig
from pipelines.ablations.study import study_pipeline

STUDY = StudyConfig(
    name="heads",
    title="Number of attention heads",
    question="What do twice the heads gain in loss at equal tokens, and what do they cost per token?",
    settings={
        "tiny": {
            "rephrase": {"max_documents": 0},
            "pretrain": {
                "optimizer": {"weight_decay": 0.1, "tau": 100.0},
                "lr": 0.01,
                "warmup_tokens": 20480,
                "stable_tokens": 593920,
                "decay_tokens": 0,
                "annealing_tokens": 0,
                "long_context_tokens": 0,
            },
        }
    },
    arms=tuple(ArmConfig(name=f"heads-{count}", fields={"model": {"num_attention_heads": count}}) for count in (4, 8)),
    reference="heads-4",
    seeds=(1, 2, 3),
    columns=(
        "parameters",
        "flops_per_token",
        "long_flops_per_token",
        "heldout_loss",
        "difference",
        "relative_difference",
        "cost_ratio",
    ),
    curves=("loss", "difference"),
)

heads = study_pipeline(STUDY)
