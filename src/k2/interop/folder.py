"""What stands beside the weights: `config.json`, tokenizer, chat template, generation settings."""

import json
import shutil
from pathlib import Path
from typing import Any

from k2.config.export import ExportConfig
from k2.data.tokenizer import SPECIAL_OFFSETS
from k2.interop.source import LogicalTensors
from k2.model.hf import dtype_fields, to_hf_config, write_config
from k2.model.storage import Format
from k2.quant.checkpoint import quantization_config
from k2.quant.folder import write_generation_config, write_tokenizer

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template*",
    "merges.txt",
    "special_tokens_map.json",
    "tiktoken.model",
    "tokenization_*.py",
    "tokenizer*",
    "vocab.*",
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def companions(folder: Path) -> list[str]:
    """Files beside the weights that a conversion reads, relative to `folder`."""
    names = [name for name in ("config.json", GENERATION) if (folder / name).is_file()]
    return names + [str(path.relative_to(folder)) for path in _tokenizer_files(folder)]


def write_checkpoint_companions(source: LogicalTensors, folder: Path, form: Format) -> None:
    """`config.json`, `tokenizer/` and, if the source has it, `generation_config.json` of a checkpoint artifact."""
    write_config(_config(source, form), folder)
    _copy_generation(source.directory, folder)
    _copy_tokenizer(source.directory, folder / "tokenizer")


def write_hf_companions(
    source: LogicalTensors, folder: Path, form: Format, group_size: int, settings: ExportConfig
) -> None:
    """`config.json`, tokenizer and `generation_config.json` of a Hugging Face folder.

    A chat template and generation settings that the source has are kept; K2's tokenizer gets K2's where it has none.
    """
    quantization = {"quantization_config": quantization_config(group_size)} if form == "int4" else {}
    write_config(_config(source, form) | quantization, folder)
    _copy_tokenizer(source.directory, folder)
    ours = _has_k2_tokens(folder)
    if ours and not _has_chat_template(folder):
        write_tokenizer(source.directory / "tokenizer", folder, settings.system_prompt)
    if not _copy_generation(source.directory, folder) and ours:
        write_generation_config(folder, settings.temperature, settings.top_p)


def _config(source: LogicalTensors, form: Format) -> dict[str, Any]:
    ids = {name: source.hf_config[name] for name in _TOKEN_IDS if name in source.hf_config}
    return to_hf_config(source.config) | dtype_fields(form) | ids


def _tokenizer_files(folder: Path) -> list[Path]:
    inner = folder / "tokenizer"
    if inner.is_dir():
        return sorted(path for path in inner.iterdir() if path.is_file())
    return sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for path in _tokenizer_files(source):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)


def _copy_generation(source: Path, folder: Path) -> bool:
    found = (source / GENERATION).is_file()
    if found:
        shutil.copyfile(source / GENERATION, folder / GENERATION)
    return found


def _has_k2_tokens(folder: Path) -> bool:
    path = folder / "tokenizer.json"
    added = json.loads(path.read_text(encoding="utf-8"))["added_tokens"] if path.is_file() else []
    return set(SPECIAL_OFFSETS) <= {token["content"] for token in added}


def _has_chat_template(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    inside = path.is_file() and "chat_template" in json.loads(path.read_text(encoding="utf-8"))
    return inside or (folder / "chat_template.jinja").is_file()
