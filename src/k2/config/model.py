"""The shape of the model: DeepSeek-V3's architecture with Kimi K2's choices. Names are Hugging Face's."""

from typing import Literal, Self

from pydantic import model_validator

from k2.config.base import Section, setting

Recompute = Literal["layers", "norms", "mla_up_projections", "attention_probabilities", "mlp_up_projections"]
"""What the backward pass computes again instead of keeping it: whole layers; outputs of norms; queries, keys and values
of every head; the attention's softmax; gate and up of dense, shared and routed experts."""


class RopeScaling(Section):
    """YaRN context extension (arXiv 2309.00071) as DeepSeek-V3 and K2 configure it."""

    factor: float = setting(32.0, "context is extended by this factor", ge=1.0)
    original_max_position_embeddings: int = setting(4096, "context length before extension", ge=1)
    beta_fast: float = setting(1.0, "rotations above which a frequency is kept", gt=0)
    beta_slow: float = setting(1.0, "rotations below which a frequency is divided by factor", gt=0)
    mscale: float = setting(1.0, "cos/sin magnitude, numerator", ge=0)
    mscale_all_dim: float = setting(1.0, "softmax scale is multiplied by (0.1 * this * ln(factor) + 1)^2", ge=0)


class ModelConfig(Section):
    """Architecture. Kimi K2's values are the defaults (report section 2.3, released config.json)."""

    vocab_size: int = setting(163840, "rows of the embedding; equals tokenize.vocab_size", ge=8)
    hidden_size: int = setting(7168, "width of the residual stream (D)", ge=8)
    intermediate_size: int = setting(18432, "width of the dense layers' MLP", ge=8)
    moe_intermediate_size: int = setting(2048, "width of one expert (F)", ge=8)
    num_hidden_layers: int = setting(61, "number of layers", ge=1)
    first_k_dense_replace: int = setting(1, "leading layers whose MLP is dense", ge=0)
    num_attention_heads: int = setting(64, "attention heads (H)", ge=1)
    q_lora_rank: int | None = setting(1536, "latent rank of queries; null for one full projection", ge=1)
    kv_lora_rank: int = setting(512, "latent rank of keys and values (K)", ge=1)
    qk_nope_head_dim: int = setting(128, "query/key dimensions without rotary position", ge=1)
    qk_rope_head_dim: int = setting(64, "query/key dimensions with rotary position; even", ge=2, multiple_of=2)
    v_head_dim: int = setting(128, "value dimensions per head", ge=1)
    n_routed_experts: int = setting(384, "routed experts (E)", ge=1)
    n_shared_experts: int = setting(1, "experts every token passes through", ge=0)
    num_experts_per_tok: int = setting(8, "routed experts a token passes through", ge=1)
    n_group: int = setting(1, "groups the experts are split into for group-limited routing", ge=1)
    topk_group: int = setting(1, "groups a token may choose experts from", ge=1)
    norm_topk_prob: bool = setting(True, "normalise the chosen experts' scores to sum one")
    routed_scaling_factor: float | None = setting(
        None, "multiplier of the routed experts' output; null derives it from the expert counts (2.827 for K2)", gt=0
    )
    rms_norm_eps: float = setting(1e-6, "epsilon of every RMSNorm", gt=0)
    rope_theta: float = setting(50000.0, "base of the rotary frequencies", gt=1)
    rope_scaling: RopeScaling | None = setting(None, "YaRN; null before the context is extended")
    max_position_embeddings: int = setting(4096, "longest context", ge=8)
    initializer_range: float = setting(0.02, "standard deviation of initial weights", gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be at most"
                f" n_routed_experts ({self.n_routed_experts})"
            )
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_group ({self.n_group}) must divide n_routed_experts ({self.n_routed_experts})")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group ({self.topk_group}) must be at most n_group ({self.n_group})")
        group_size = self.n_routed_experts // self.n_group
        if self.n_group > 1 and group_size < 2:
            raise ValueError(f"n_group ({self.n_group}) must leave at least two experts in a group")
        if self.topk_group * group_size < self.num_experts_per_tok:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be at most the"
                f" {self.topk_group * group_size} experts of topk_group groups"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError("first_k_dense_replace must be at most num_hidden_layers")
        return self

    @property
    def mixture_layers(self) -> int:
        """Layers with experts."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def qk_head_dim(self) -> int:
        """Query/key dimensions per head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim
