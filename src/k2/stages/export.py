"""Stage `export`: the RL model in bfloat16 and the quantisation-aware trained one in INT4, for other software."""

from k2.config.export import ExportConfig
from k2.execution.contract import Progress, StageResult
from k2.interop.convert import write_folder
from k2.model.hf import read_config
from k2.model.layout import logical_tensors
from k2.model.storage import weight_bytes
from k2.quant.checkpoint import bits_per_weight
from k2.store.artifacts import Artifact, ArtifactWriter


def run(
    config: ExportConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress
) -> StageResult:
    """Publish `bf16/` from the input `model` and `int4/` from `quantized`, both complete Hugging Face folders."""
    model, quantized = inputs["model"].directory(), inputs["quantized"].directory()
    group_size = inputs["quantized"].json("quantization.json")["group_size"]
    write_folder(model, output.path("bf16/config.json").parent, "bf16", group_size, config)
    progress.update(1, 2, "folders")
    write_folder(quantized, output.path("int4/config.json").parent, "int4", group_size, config)
    progress.update(2, 2, "folders")
    routed, whole = bits_per_weight(read_config(quantized), group_size)
    metrics = {
        "bf16_bytes": weight_bytes(logical_tensors(read_config(model)), "bf16"),
        "int4_bytes": weight_bytes(logical_tensors(read_config(quantized)), "int4", group_size),
        "bits_per_weight": routed,
        "bits_per_weight_model": whole,
    }
    return StageResult(output.publish(**metrics))
