"""The sparsity law: more experts in all, as many active, a lower loss at equal FLOPs (K2 report, section 2.3).

`k2 run --pipeline ablations/sparsity` runs it on this machine.

Two routed experts and one shared one are active throughout; sparsity is experts over active ones. The paper needs 1.69,
1.39 and 1.15 times fewer FLOPs at sparsity 48 than at 8, 16 and 32 for one loss, at budgets many orders larger. The
router's own product grows with the experts, so the axis is FLOPs, not tokens. The learning rate is constant after
warm-up: a loss at fewer FLOPs is that of a training which ends there.
"""

from k2.config.ablations import ArmConfig, StudyConfig
from pipelines.ablations.study import study_pipeline

EXPERTS = (8, 16, 32, 64)

STUDY = StudyConfig(
    name="sparsity",
    title="Sparsity: total experts at fixed active ones",
    question="Two routed experts of a token active throughout: does the loss at equal training FLOPs fall as experts in"
    " all grow from 8 to 64?",
    settings={
        "tiny": {
            "rephrase": {"max_documents": 0},
            "pretrain": {
                "model": {"num_experts_per_tok": 2, "moe_intermediate_size": 64},
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
    arms=tuple(ArmConfig(name=f"experts-{count}", fields={"model": {"n_routed_experts": count}}) for count in EXPERTS),
    reference="experts-8",
    seeds=(1, 2, 3),
    axis="flops",
    columns=(
        "parameters",
        "active_parameters",
        "flops_per_token",
        "heldout_loss",
        "loss_at_equal_cost",
        "difference_at_equal_cost",
        "cost_ratio",
    ),
    curves=("loss", "difference"),
)

sparsity = study_pipeline(STUDY)
