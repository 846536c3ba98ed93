"""Activations kept as FP8 for the backward pass: what becomes of the loss (K2 report, section 2.4).

`k2 run --pipeline ablations/fp8_storage` runs it on this machine.

In bfloat16 any other rounding soon sends tokens to other experts, and two trainings part. So the third arm changes the
rounding and hardly anything else, by a balance loss that weighs a thousandth more: a difference is one only if it is
larger than that arm's.
"""

from k2.config.ablations import ArmConfig, StudyConfig
from pipelines.ablations.study import study_pipeline

STUDY = StudyConfig(
    name="fp8_storage",
    title="Activations stored as FP8",
    question="Does keeping inputs of MoE up-projections and SwiGLU as FP8 E4M3 with a scale for 128 values change the"
    " loss by more than other rounding does?",
    settings={
        "tiny": {
            "rephrase": {"max_documents": 0},
            "pretrain": {
                "warmup_tokens": 20480,
                "stable_tokens": 122880,
                "decay_tokens": 102400,
                "annealing_tokens": 0,
                "long_context_tokens": 0,
            },
        },
        "nano": {"rephrase": {"max_documents": 0}},
    },
    arms=(
        ArmConfig(name="bfloat16", fields={"fp8_storage": False}),
        ArmConfig(name="fp8", fields={"fp8_storage": True}),
        ArmConfig(name="other-rounding", fields={"fp8_storage": False, "balance_loss_weight": 1.001e-4}),
    ),
    reference="bfloat16",
    seeds=(1, 2, 3),
    columns=("heldout_loss", "difference", "relative_difference"),
    curves=("difference",),
)

fp8_storage = study_pipeline(STUDY)
