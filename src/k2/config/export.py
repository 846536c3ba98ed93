"""The Hugging Face folders that other software reads."""

from k2.config.base import StageSection, setting


class ExportConfig(StageSection):
    """How the exported folders are cut, and what they recommend to who samples from them."""

    shard_bytes: int = setting(4 * 2**30, "largest safetensors file in bytes; one tensor may exceed it", ge=1)
    temperature: float = setting(0.6, "sampling temperature written to generation_config.json", gt=0, le=2)
    top_p: float = setting(1.0, "nucleus written to generation_config.json", gt=0, le=1)
    system_prompt: str | None = setting(
        None, "system message that the chat template adds where a dialog has none; null adds none, as in training"
    )
