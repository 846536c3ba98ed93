"""Shapes for parity tests and the independent reference: transformers' DeepseekV3ForCausalLM."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers.modeling_rope_utils as rope_utils
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

from k2.config.model import ModelConfig, RopeScaling
from k2.model.hf import to_hf_config
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=3,
    q_lora_rank=20,
    kv_lora_rank=24,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=14,
    n_routed_experts=6,
    num_experts_per_tok=2,
    max_position_embeddings=256,
    initializer_range=0.1,
)
YARN = RopeScaling(factor=8.0, original_max_position_embeddings=32, beta_fast=32.0, beta_slow=1.0)

SHAPES = {
    "plain": TINY,
    "odd": TINY.model_copy(update={"vocab_size": 101, "hidden_size": 37, "num_attention_heads": 5, "v_head_dim": 7}),
    "full_query": TINY.model_copy(update={"q_lora_rank": None}),
    "groups": TINY.model_copy(update={"n_routed_experts": 8, "n_group": 4, "topk_group": 2}),
    "yarn": TINY.model_copy(update={"rope_scaling": YARN}),
    "yarn_magnitudes": TINY.model_copy(
        update={"rope_scaling": YARN.model_copy(update={"mscale": 0.707, "mscale_all_dim": 1.3, "beta_fast": 1.0})}
    ),
    "one_expert": TINY.model_copy(update={"num_experts_per_tok": 1, "norm_topk_prob": False}),
    "two_shared": TINY.model_copy(update={"n_shared_experts": 2, "first_k_dense_replace": 2}),
}


class _Float64Torch:
    """The torch module with float32 meaning float64: the reference names float32 inside its norms and router."""

    float32 = torch.float64
    float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def float64_reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for module in (modeling, rope_utils):
            patch.setattr(module, "torch", _Float64Torch())
        patch.setattr(torch.Tensor, "float", lambda tensor: tensor.double())
        yield


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    """Our model in float64 with unequal norms and selection biases, so that a wrong one shows."""
    model = Transformer(config, compute_dtype=torch.float64).initialize(seed).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(tensor.float())
    return model


def build_reference(model: Transformer) -> DeepseekV3ForCausalLM:
    """The reference with the same weights, in the model's compute precision."""
    config = DeepseekV3Config(**to_hf_config(model.config), attn_implementation="eager", experts_implementation="eager")
    reference = DeepseekV3ForCausalLM(config).to(model.compute_dtype).eval()
    state, targets = model.state_dict(), reference_tensors(reference)
    with torch.no_grad():
        for tensor in logical_tensors(model.config):
            targets[tensor.name].copy_(part(state[tensor.parameter], tensor))
    return reference


def part(parameter: torch.Tensor, tensor: Any) -> torch.Tensor:
    piece = parameter if tensor.index is None else parameter[tensor.index]
    return piece if tensor.rows is None else piece[tensor.rows]


def reference_tensors(reference: DeepseekV3ForCausalLM, gradients: bool = False) -> dict[str, torch.Tensor]:
    """The reference's tensors, or their gradients, by per-expert checkpoint name."""
    result: dict[str, torch.Tensor] = dict(reference.named_buffers())
    for name, parameter in reference.named_parameters():
        value = parameter.grad if gradients else parameter.data
        stem = name.rsplit(".", 1)[0]
        if name.endswith("experts.gate_up_proj"):
            width = parameter.shape[1] // 2
            for e in range(parameter.shape[0]):
                result[f"{stem}.{e}.gate_proj.weight"] = value[e, :width]
                result[f"{stem}.{e}.up_proj.weight"] = value[e, width:]
        elif name.endswith("experts.down_proj"):
            result |= {f"{stem}.{e}.down_proj.weight": value[e] for e in range(parameter.shape[0])}
        else:
            result[name] = value
    return result
