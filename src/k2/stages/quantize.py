"""Stage `quantize`: INT4 quantisation-aware training of the routed experts."""

import copy
import json
import shutil
from typing import Any

import torch

from k2.config.quantize import QuantizeConfig, group_problem
from k2.data.tokenizer import Tokenizer
from k2.distributed.checkpoint import Checkpoints
from k2.errors import UserError
from k2.execution.contract import Progress, StageResult
from k2.model import hf
from k2.model.backend import use_kernels
from k2.quant.checkpoint import bits_per_weight
from k2.quant.qat import QuantizationAwareTraining
from k2.rl.demonstrations import task_demonstrations, trajectory_demonstrations
from k2.store.artifacts import Artifact, ArtifactWriter
from k2.training.state import TrainState


def run(
    config: QuantizeConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress
) -> StageResult:
    """Publish a checkpoint of masters whose routed experts were trained as INT4, with `quantization.json`.

    Raises:
        UserError: the group size does not divide the experts' widths, or no dialog fits the context.
        StageError: too many updates in a row were skipped.
    """
    torch.manual_seed(config.seed)
    use_kernels(config.kernels)
    source = inputs["model"].directory()
    teacher = hf.load(source, compute_dtype=getattr(torch, config.precision))
    problem = group_problem(teacher.config, config.group_size)
    if problem is not None:
        raise UserError(problem)
    tokenizer = Tokenizer.load(source / "tokenizer")
    dialogs = task_demonstrations(tokenizer, config.tasks, config.demonstrations, config.seed)
    if config.use_trajectories:
        dialogs += trajectory_demonstrations(tokenizer, inputs["trajectories"].path("trajectories.jsonl"))
    training = QuantizationAwareTraining(config, teacher, tokenizer, dialogs)
    student = copy.deepcopy(teacher).requires_grad_(True)
    with Checkpoints(output.work, config.checkpoint_steps) as checkpoints:
        state = training.run(student, checkpoints, progress)

    directory = output.path("config.json").parent
    hf.save(student, student.config, directory)
    shutil.copytree(source / "tokenizer", directory / "tokenizer")
    metrics = _metrics(config, state)
    output.path("quantization.json").write_text(json.dumps({"bits": 4, "group_size": config.group_size}) + "\n")
    report = {"metrics": metrics, "measurements": state.notes, "curves": state.history.curves()}
    output.path("report.json").write_text(json.dumps(report, sort_keys=True))
    return StageResult(output.publish(**metrics))


def _metrics(config: QuantizeConfig, state: TrainState) -> dict[str, Any]:
    notes = state.notes
    routed, whole = bits_per_weight(state.model.config, config.group_size)
    return {
        "accuracy_bf16": notes["bf16"]["accuracy"]["accuracy"],
        "accuracy_int4_ptq": notes["int4_ptq"]["accuracy"]["accuracy"],
        "accuracy_int4": notes["int4"]["accuracy"]["accuracy"],
        "loss_before_qat": notes["int4_ptq"]["loss"],
        "loss_after_qat": notes["int4"]["loss"],
        "bits_per_weight": routed,
        "bits_per_weight_model": whole,
    }
