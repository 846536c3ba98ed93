"""A small model with its tokenizer, as a checkpoint artifact's files."""

from functools import cache
from pathlib import Path

import torch

from k2.config.model import ModelConfig
from k2.data.tokenizer import Tokenizer
from k2.model import hf
from k2.model.transformer import Transformer

TINY = ModelConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=1024,
    initializer_range=0.1,
)


@cache
def tokenizer() -> Tokenizer:
    """Bytes, a few merges and K2's special tokens; each digit is one token."""
    texts = ["The sum of two numbers is a number. Set a timer, save a note, buy items. functions assistant user"] * 20
    return Tokenizer.train(texts, TINY.vocab_size, digits_per_token=1, special_slots=20)


def model(seed: int = 0) -> Transformer:
    """Random weights, and selection biases that are not zero."""
    built = Transformer(TINY).initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in built.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.01 * torch.randn(buffer.shape, generator=generator))
    return built


def write_checkpoint(directory: Path, seed: int = 0) -> dict[str, Path]:
    """Files of a checkpoint artifact by name."""
    hf.save(model(seed), TINY, directory)
    tokenizer().save(directory / "tokenizer")
    return {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}


def prompts(count: int = 3, length: int = 24, seed: int = 5) -> torch.Tensor:
    """Random tokens [B, L]."""
    return torch.randint(0, TINY.vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))
