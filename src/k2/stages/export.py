"""Stage `export`: the RL model in bfloat16 and the quantisation-aware trained one in INT4, for other software."""

from pathlib import Path

from k2.config.export import ExportConfig
from k2.execution.contract import Progress, StageResult
from k2.model.hf import CheckpointTensors, read_config
from k2.quant.checkpoint import bits_per_weight, write_bf16, write_int4
from k2.quant.folder import write_generation_config, write_tokenizer
from k2.store.artifacts import Artifact, ArtifactWriter


def run(
    config: ExportConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress
) -> StageResult:
    """Publish `bf16/` from the input `model` and `int4/` from `quantized`, both complete Hugging Face folders."""
    model, quantized = inputs["model"].directory(), inputs["quantized"].directory()
    group_size = inputs["quantized"].json("quantization.json")["group_size"]
    bf16, int4 = output.path("bf16/config.json").parent, output.path("int4/config.json").parent
    write_bf16(CheckpointTensors(model / "model"), read_config(model), bf16, config.shard_bytes)
    progress.update(1, 2, "folders")
    architecture = read_config(quantized)
    write_int4(CheckpointTensors(quantized / "model"), architecture, int4, config.shard_bytes, group_size)
    progress.update(2, 2, "folders")
    for source, folder in ((model, bf16), (quantized, int4)):
        write_tokenizer(source / "tokenizer", folder, config.system_prompt)
        write_generation_config(folder, config.temperature, config.top_p)
    routed, whole = bits_per_weight(architecture, group_size)
    metrics = {
        "bf16_bytes": _size(bf16),
        "int4_bytes": _size(int4),
        "bits_per_weight": routed,
        "bits_per_weight_model": whole,
    }
    return StageResult(output.publish(**metrics))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
