"""Stage `rl`: reinforcement learning on verifiable tasks and rubric-judged requests."""

import json
import shutil

import torch

from k2.config.rl import RlConfig
from k2.data.tokenizer import Tokenizer
from k2.distributed.checkpoint import Checkpoints
from k2.execution.contract import Progress, StageResult
from k2.model import hf
from k2.model.backend import use_kernels
from k2.rl.critic import RuleCritic
from k2.rl.prompts import opening_requests
from k2.rl.trainer import Trainer, metrics_of, report_of
from k2.store.artifacts import Artifact, ArtifactWriter


def run(config: RlConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress) -> StageResult:
    """Train `model` on its own answers; write a checkpoint artifact, its tokenizer, and the curves.

    Raises StageError when too many updates in a row had to be skipped, or no answer could be trained on.
    """
    torch.manual_seed(config.seed)
    use_kernels(config.kernels)
    folder = inputs["model"].directory()
    tokenizer = Tokenizer.load(folder / "tokenizer")
    general = opening_requests(inputs["trajectories"].path("trajectories.jsonl")) if config.general_share > 0 else []
    model = hf.load(folder)
    trainer = Trainer(config, model, tokenizer, RuleCritic(), general)
    with Checkpoints(output.work, config.checkpoint_iterations * config.updates) as checkpoints:
        state = trainer.run(checkpoints, progress)
    hf.save(model, model.config, output.path("config.json").parent)
    shutil.copytree(folder / "tokenizer", output.path("tokenizer/tokenizer.json").parent, dirs_exist_ok=True)
    metrics = metrics_of(state) | {"failed_samples": trainer.source.failed}
    output.path("report.json").write_text(json.dumps(report_of(state), sort_keys=True), encoding="utf-8")
    return StageResult(output.publish(**metrics))
