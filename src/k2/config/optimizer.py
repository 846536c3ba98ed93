"""MuonClip and the rules of one training step. Kimi K2's values are the defaults (report section 2.1 and 2.5)."""

from typing import Literal

from k2.config.base import Section, setting


class OptimizerConfig(Section):
    """Muon for matrices, AdamW for embeddings, head and gains, QK-Clip, expert bias, and what to do with bad steps."""

    matrices: Literal["muon", "adamw"] = setting("muon", "what updates the matrices; adamw is there to compare with")
    momentum: float = setting(0.95, "Muon's momentum (mu)", ge=0, lt=1)
    nesterov: bool = setting(True, "feed mu * M + G to Newton-Schulz instead of M, as Moonlight does")
    newton_schulz: Literal["polar_express", "moonlight"] = setting(
        "polar_express", "iterations: four best polynomials (arXiv 2505.16932) or Moonlight's five equal ones"
    )
    newton_schulz_bf16: bool = setting(True, "orthogonalise in bfloat16; false takes float32")
    update_rms: float = setting(0.2, "root mean square of a full-rank Muon update, before the learning rate", gt=0)
    weight_decay: float = setting(0.1, "decoupled weight decay of every weight, gains included", ge=0)
    adam_beta1: float = setting(0.9, "AdamW's decay of the gradient average", ge=0, lt=1)
    adam_beta2: float = setting(0.95, "AdamW's decay of the squared-gradient average", ge=0, lt=1)
    adam_eps: float = setting(1e-8, "AdamW's epsilon", gt=0)
    tau: float | None = setting(
        100.0, "QK-Clip's threshold on a head's largest attention logit; null never clips", gt=0
    )
    bias_update_speed: float = setting(1e-3, "step of the expert-balancing bias; 0 freezes it", ge=0)
    max_grad_norm: float | None = setting(None, "clip the global gradient norm to this; null never clips", gt=0)
    spike_margin: float | None = setting(
        None, "a loss this many nats above its running mean is a spike; null looks for none", gt=0
    )
    spike_policy: Literal["skip", "rollback", "stop", "off"] = setting(
        "skip",
        "a spike's update is left out (skip), or the run goes back to the last checkpoint and leaves the batch out"
        " (rollback), or the stage fails (stop), or the update is made and reported (off)",
    )
    max_skipped_steps: int = setting(5, "fail after this many skipped updates in a row, or rollbacks at one step", ge=1)
    spectral_interval: int = setting(
        0, "steps between measurements of every head's spectral norms in W_q and W_k; 0 never measures", ge=0
    )
