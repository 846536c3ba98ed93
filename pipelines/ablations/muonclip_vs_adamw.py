"""How many tokens does MuonClip need for the loss of AdamW? About 52% by Moonlight's scaling laws (arXiv 2502.16982).

`k2 run --pipeline ablations/muonclip_vs_adamw` runs it on this machine.

Both are tuned: the learning rate of each is the best of a grid on a seed that takes no part in the comparison. The rate
is constant after warm-up, so that the loss at any number of tokens is that of a training which ends there by the same
rule. No text is seen twice, so the training loss is one on fresh text.
"""

from k2.config.ablations import ArmConfig, StudyConfig, SweepConfig
from pipelines.ablations.study import study_pipeline

SCHEDULE = {
    "warmup_tokens": 20480,
    "stable_tokens": 593920,
    "decay_tokens": 0,
    "annealing_tokens": 0,
    "long_context_tokens": 0,
}

STUDY = StudyConfig(
    name="muonclip_vs_adamw",
    title="MuonClip against AdamW",
    question="Both tuned: which share of AdamW's tokens does MuonClip need to reach AdamW's last loss?",
    settings={
        "tiny": {
            "rephrase": {"max_documents": 0},
            "pretrain": {"optimizer": {"weight_decay": 0.1, "tau": 100.0}, **SCHEDULE},
        }
    },
    arms=(
        ArmConfig(name="adamw", fields={"optimizer": {"matrices": "adamw"}}),
        ArmConfig(name="muonclip"),
    ),
    reference="adamw",
    seeds=(1, 2, 3),
    sweep=SweepConfig(
        field="lr", values={"adamw": (0.0025, 0.005, 0.01, 0.02), "muonclip": (0.005, 0.01, 0.02, 0.04)}, seeds=(101,)
    ),
    columns=(
        "tuned",
        "heldout_loss",
        "difference",
        "loss_at_equal_cost",
        "difference_at_equal_cost",
        "cost_ratio",
        "max_logit",
    ),
    curves=("loss", "difference"),
)

muonclip_vs_adamw = study_pipeline(STUDY)
