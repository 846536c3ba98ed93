"""Stage `sft`: supervised fine-tuning on solved tasks and accepted trajectories."""

import json
import shutil

import torch

from k2.config.sft import SftConfig
from k2.data.tokenizer import Tokenizer
from k2.distributed.checkpoint import Checkpoints
from k2.execution.contract import Progress, StageResult
from k2.model import hf
from k2.model.backend import use_kernels
from k2.rl.demonstrations import task_demonstrations, trajectory_demonstrations
from k2.rl.sft import accuracy, accurate_enough, demonstration_source, fine_tune
from k2.store.artifacts import Artifact, ArtifactWriter


def run(config: SftConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress) -> StageResult:
    """Fine-tune `model`; write a checkpoint artifact with its tokenizer, curves and held-out accuracy.

    Raises UserError when no dialog fits into a row, StageError when too many updates in a row had to be skipped.
    """
    torch.manual_seed(config.seed)
    use_kernels(config.kernels)
    base = inputs["model"]
    folder = base.directory()
    tokenizer = Tokenizer.load(folder / "tokenizer")
    dialogs = task_demonstrations(tokenizer, config.tasks, config.demonstrations, config.seed)
    if config.use_trajectories:
        trajectories = trajectory_demonstrations(tokenizer, inputs["trajectories"].path("trajectories.jsonl"))
        dialogs += trajectories[: config.max_trajectories]
    source = demonstration_source(config, tokenizer, dialogs)
    model = hf.load(folder)
    enough = accurate_enough(config, model, tokenizer, progress)
    with Checkpoints(output.work, config.checkpoint_steps) as checkpoints:
        state = fine_tune(config, model, source, checkpoints, progress, enough)
    hf.save(model, model.config, output.path("config.json").parent)
    shutil.copytree(folder / "tokenizer", output.path("tokenizer/tokenizer.json").parent, dirs_exist_ok=True)
    scores, losses = accuracy(config, model, tokenizer), state.history.curve("loss")
    metrics = {
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "steps": state.step,
        "accuracy": scores["sampled"]["accuracy"],
        "sampled": scores["sampled"],
        "greedy": scores["greedy"],
        "dialogs": len(source.dialogs),
        "dropped_too_long": source.dropped,
    }
    report = {"curves": state.history.curves(), "accuracy": scores, "dropped_too_long": source.dropped}
    output.path("report.json").write_text(json.dumps(report, sort_keys=True), encoding="utf-8")
    return StageResult(output.publish(**metrics))
