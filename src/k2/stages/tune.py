"""Stage `tune`: one arm of a study that goes on from a checkpoint, and its answers to held-out problems."""

import json
import shutil
import time

import torch

from k2.ablations.answers import Answers
from k2.ablations.tuning import Tuning
from k2.config.tune import TuneConfig
from k2.data.tokenizer import Tokenizer
from k2.execution.contract import Progress, StageResult
from k2.model import hf
from k2.model.backend import use_kernels
from k2.store.artifacts import Artifact, ArtifactWriter


def run(config: TuneConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress) -> StageResult:
    """Write a checkpoint artifact with its tokenizer, and `answers.json`; the CPU seconds of training are an event.

    Raises StageError when too many updates in a row had to be skipped, or no answer could be trained on.
    """
    torch.manual_seed(config.seed)
    use_kernels(config.kernels)
    folder = inputs["model"].directory()
    model, tokenizer = hf.load(folder), Tokenizer.load(folder / "tokenizer")
    tuning, start = Tuning(config, tokenizer, progress), time.process_time()
    tuning.run(model, output.work)
    progress.event("cost", cpu_s=round(time.process_time() - start, 1))
    answers = tuning.answers(model)
    hf.save(model, model.config, output.path("config.json").parent)
    shutil.copytree(folder / "tokenizer", output.path("tokenizer/tokenizer.json").parent, dirs_exist_ok=True)
    output.path("answers.json").write_text(json.dumps(answers, sort_keys=True) + "\n", encoding="utf-8")
    return StageResult(output.publish(**Answers.of(answers).rates()))
