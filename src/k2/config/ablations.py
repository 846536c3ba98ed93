"""An ablation study: one pretraining, arms that differ from it in a few fields, several seeds, one comparison."""

from typing import Any, Literal, Self

from pydantic import model_validator

from k2.config.base import Section, setting

Fields = dict[str, Any]

Column = Literal[
    "parameters",
    "active_parameters",
    "flops_per_token",
    "long_flops_per_token",
    "tuned",
    "heldout_loss",
    "difference",
    "relative_difference",
    "loss_at_equal_cost",
    "difference_at_equal_cost",
    "cost_ratio",
    "max_logit",
    "median_logit",
    "clipped_heads",
    "clipping_peak",
    "clipping_late",
    "clipping_end",
    "last_clip",
    "covered_sampled",
    "covered_greedy",
    "uncovered_sampled",
    "uncovered_greedy",
    "covered_sampled_difference",
    "covered_greedy_difference",
    "uncovered_sampled_difference",
    "uncovered_greedy_difference",
]
Curve = Literal["loss", "difference", "max_logit", "clipping", "pass_rates"]


class ArmConfig(Section):
    """One way to train."""

    name: str = setting(..., "what tables, figures and task names call it", pattern=r"^[a-z0-9][a-z0-9.-]{0,15}$")
    fields: Fields = setting({}, "fields of the stage in which it differs from the study's setting")
    after: str | None = setting(
        None, "stage `tune`: the arm above whose checkpoint, of the same seed, it goes on from; null for pretraining's"
    )


class SweepConfig(Section):
    """Tunes one field of every arm on seeds of its own before the arms are compared."""

    field: str = setting("lr", "the field of `pretrain` that is tuned; the lowest mean held-out loss wins")
    values: dict[str, tuple[float, ...]] = setting(..., "arm -> values tried; every arm has some")
    seeds: tuple[int, ...] = setting(..., "seeds that take no part in the comparison", min_length=1)


class StudyConfig(Section):
    """What is compared, on which seeds, along which axis, and what the table and the figures show."""

    name: str = setting(..., "names the study's files", pattern=r"^[a-z0-9_]+$")
    title: str = setting(..., "heading of the report")
    question: str = setting(..., "what the study asks, one or two sentences")
    settings: dict[str, Fields] = setting(
        {}, "preset -> fields over it that hold for every arm; others run as they are"
    )
    stage: Literal["pretrain", "tune"] = setting(
        "pretrain", "what an arm runs: pretraining, or training that follows it"
    )
    arms: tuple[ArmConfig, ...] = setting(..., "the arms", min_length=2)
    reference: str = setting(..., "the arm that differences and ratios are taken against")
    seeds: tuple[int, ...] = setting(
        (1, 2, 3), "seeds of weights and data order; one run of every arm each", min_length=2
    )
    sweep: SweepConfig | None = setting(None, "a field to tune per arm first; null compares the arms as declared")
    axis: Literal["tokens", "flops"] = setting("tokens", "cost at which losses are equalled: tokens or training FLOPs")
    columns: tuple[Column, ...] = setting(("heldout_loss", "difference"), "columns of the table")
    curves: tuple[Curve, ...] = setting(("loss",), "figures over the axis", min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"arms must have names of their own, got {', '.join(names)}")
        if self.reference not in names:
            raise ValueError(f"reference {self.reference!r} must be one of the arms {', '.join(names)}")
        for place, arm in enumerate(self.arms):
            if arm.after is not None and (self.stage == "pretrain" or arm.after not in names[:place]):
                raise ValueError(f"{arm.name}.after: {arm.after!r} must be an arm above, in a study of the stage tune")
        if self.sweep and set(self.sweep.seeds) & set(self.seeds):
            raise ValueError("sweep.seeds must take no part in seeds")
        if self.sweep and set(self.sweep.values) != set(names):
            raise ValueError(f"sweep.values must be given for the arms {', '.join(names)}")
        return self

    @property
    def labels(self) -> list[str]:
        """Every run of the comparison, in the order of arms and seeds."""
        return [run_label(arm.name, seed) for arm in self.arms for seed in self.seeds]

    @property
    def sweep_labels(self) -> list[str]:
        """Every run of the sweep, in the order of arms, values and seeds."""
        return [label for arm in self.arms for label in self.candidates(arm.name)]

    def candidates(self, arm: str) -> list[str]:
        """The runs of the sweep that tune one arm."""
        if self.sweep is None:
            return []
        return [run_label(arm, seed, value) for value in self.sweep.values[arm] for seed in self.sweep.seeds]


def run_label(arm: str, seed: int, value: float | None = None) -> str:
    """Name of one training of a study: arm, the value it tries in a sweep, seed."""
    return f"{arm}.{seed}" if value is None else f"{arm}.{value:g}.{seed}"
