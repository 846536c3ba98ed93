"""Attention logits explode under Muon and stay at tau under MuonClip, at which loss? tau as in the paper (section 2.1).

`k2 run --pipeline ablations/qk_clip` runs it on this machine.

The setting is chosen so that logits do explode in 300 steps: MLA without query-key norms, many small heads, a learning
rate at the upper end of what trains, no weight decay. Decay acts as lr * weight_decay * steps: 0.3 in Kimi K2's
recipe after the 15,000 steps in which logits passed 1,000 (report, figure 2): it does not hold weights back there.
"""

from k2.config.ablations import ArmConfig, StudyConfig
from pipelines.ablations.study import study_pipeline

TINY = {
    "rephrase": {"max_documents": 0},
    "pretrain": {
        "model": {"num_attention_heads": 8},
        "optimizer": {"weight_decay": 0.0},
        "lr": 0.04,
        "warmup_tokens": 20480,
        "stable_tokens": 593920,
        "decay_tokens": 0,
        "annealing_tokens": 0,
        "long_context_tokens": 0,
    },
}
NANO = {
    "rephrase": {"max_documents": 0},
    "pretrain": {"optimizer": {"weight_decay": 0.0}, "lr": 0.05, "decay_tokens": 0, "long_context_tokens": 0},
}

STUDY = StudyConfig(
    name="qk_clip",
    title="QK-Clip: attention logits with and without it",
    question="Do attention logits explode under Muon where QK-Clip holds them at tau, what does clipping cost in loss,"
    " and does it stop by itself?",
    settings={"tiny": TINY, "nano": NANO},
    arms=(
        ArmConfig(name="muon", fields={"optimizer": {"tau": None}}),
        ArmConfig(name="tau-100", fields={"optimizer": {"tau": 100.0}}),
        ArmConfig(name="tau-50", fields={"optimizer": {"tau": 50.0}}),
        ArmConfig(name="tau-30", fields={"optimizer": {"tau": 30.0}}),
    ),
    reference="muon",
    seeds=(1, 2, 3),
    columns=(
        "heldout_loss",
        "difference",
        "max_logit",
        "median_logit",
        "clipped_heads",
        "clipping_peak",
        "clipping_late",
    ),
    curves=("max_logit", "clipping", "difference"),
)

qk_clip = study_pipeline(STUDY)
