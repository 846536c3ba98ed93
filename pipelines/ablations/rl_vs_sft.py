"""Does RL add what more supervision cannot? Three arms from one plateau checkpoint, five seeds.

`k2 run --pipeline ablations/rl_vs_sft` runs it on this machine.

Two-digit addition; demonstrations cover 44% of it. Step counts were set on seed 17, which takes no part, so that the
arms take equal CPU time. RL and rejection sampling see about as many prompts and answers.
"""

from typing import Any

from k2.config.ablations import ArmConfig, StudyConfig
from pipelines.ablations.study import study_pipeline

TASK = {"addition_2": 1.0}

SFT = {
    "tasks": TASK,
    "demonstrations": 1000,
    "context_length": 224,
    "batch_size": 7,
    "micro_batch_size": 7,
    "lr": 0.02,
    "final_lr_ratio": 0.05,
    "warmup_steps": 10,
}
RL = {
    "tasks": TASK,
    "general_share": 0.0,
    "iterations": 58,
    "prompts": 32,
    "samples": 16,
    "max_tokens": 8,
    "temperature": 1.2,
    "final_temperature": 1.0,
    "reward": {"rubric": 0.0, "budget_penalty": 0.2},
    "ptx_coefficient": 0.0,
    "micro_batch_tokens": 6144,
    "lr": 0.002,
    "final_lr_ratio": 0.02,
    "warmup_steps": 5,
    "optimizer": {"adam_eps": 0.001, "max_grad_norm": 1.0, "momentum": 0.8, "bias_update_speed": 0},
    # Accuracy on the way is not measured: it would count as the arm's CPU time.
    "evaluation_items": 1,
    "evaluation_curve_items": 1,
    "evaluation_interval": 1000,
}


def way(method: str, steps: int) -> dict[str, Any]:
    """Fields of one arm; `steps` are those of supervision."""
    return {"method": method, "rejection_prompts": 512, "sft": {**SFT, "steps": steps}, "rl": RL}


STUDY = StudyConfig(
    name="rl_vs_sft",
    title="RL against more supervision",
    question="After supervision has stopped helping: what do RL, more supervision and fine-tuning on the model's own"
    " right answers add, at about equal cost?",
    stage="tune",
    arms=(
        ArmConfig(name="plateau", fields=way("sft", 350)),
        ArmConfig(name="sft", after="plateau", fields=way("sft", 245)),
        ArmConfig(name="rejection", after="plateau", fields=way("rejection", 50)),
        ArmConfig(name="rl", after="plateau", fields=way("rl", 245)),
    ),
    reference="sft",
    seeds=(1, 2, 3, 4, 5),
    columns=(
        "covered_sampled",
        "covered_greedy",
        "uncovered_sampled",
        "uncovered_greedy",
        "covered_greedy_difference",
        "uncovered_sampled_difference",
        "uncovered_greedy_difference",
    ),
    curves=("pass_rates",),
)

rl_vs_sft = study_pipeline(STUDY)
