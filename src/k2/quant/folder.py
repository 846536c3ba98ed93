"""What a Hugging Face folder holds beside its weights: tokenizer with chat template, and how to generate."""

import json
from pathlib import Path
from typing import Any

from k2.data.tokenizer import Tokenizer
from k2.serving.chat_template import IM_END, jinja_template


def write_tokenizer(source: Path, folder: Path, system_prompt: str | None) -> None:
    """Copy the tokenizer and give it K2's chat template.

    `system_prompt` is what the template says where a dialog has no system message.
    """
    for path in sorted(source.iterdir()):
        (folder / path.name).write_bytes(path.read_bytes())
    config = _read(folder / "tokenizer_config.json")
    _write(folder / "tokenizer_config.json", config | {"chat_template": jinja_template(system_prompt)})


def write_generation_config(folder: Path, temperature: float, top_p: float) -> None:
    """Write `generation_config.json`, and the same token ids into `config.json`: a turn ends with `<|im_end|>`."""
    special = Tokenizer.load(folder).special
    ids = {
        "bos_token_id": special["[BOS]"],
        "eos_token_id": [special[IM_END], special["[EOS]"]],
        "pad_token_id": special["[PAD]"],
    }
    _write(folder / "config.json", _read(folder / "config.json") | ids)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    _write(folder / "generation_config.json", ids | sampling)


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
