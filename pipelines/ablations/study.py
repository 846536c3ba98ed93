"""One DAG for all ablation studies: shared data, a training per arm and seed, one comparison."""

import json
from collections.abc import Sequence
from itertools import chain, product
from typing import Any

from kfp import dsl

from components.arm.component import arm
from components.compare.component import compare
from components.corpus.component import corpus
from components.ingest.component import ingest
from components.pretrain.component import pretrain
from components.rephrase.component import rephrase
from components.report.component import report
from components.study.component import study
from components.tokenize.component import tokenize
from k2.config.ablations import StudyConfig, run_label
from pipelines.placement import place


def study_pipeline(definition: StudyConfig) -> Any:
    """The pipeline of a study. Every training is a task of its own: a cluster runs them side by side."""
    document = definition.model_dump_json()

    @dsl.pipeline(name=definition.name.replace("_", "-"), description=definition.title)
    def ablation(preset: str = "tiny", overrides: str = "", run: str = "") -> None:
        """Compare arms over several seeds.

        Args:
            preset: What the study's setting starts from: nano, tiny, small, moonlight-16b or k2-1t.
            overrides: Fields that differ from the study's setting in all arms, as YAML.
            run: Name of this run in the object store; empty takes the name Kubeflow gave it.
        """
        job = dsl.PIPELINE_JOB_NAME_PLACEHOLDER
        finish = place(report(preset=preset, run=run, job=job), "report")
        with dsl.ExitHandler(finish, name="study"):
            shared = study(definition=document, preset=preset, overrides=overrides, run=run, job=job)
            config = place(shared, "configure").output
            raw = place(corpus(config=config), "corpus").outputs["artifact"]
            clean = place(ingest(config=config, corpus=raw), "ingest").outputs["artifact"]
            diverse = place(rephrase(config=config, documents=clean), "rephrase").outputs["artifact"]
            tokens = place(tokenize(config=config, documents=diverse, heldout=clean), "tokenize").outputs["artifact"]
            start = tokens
            if definition.stage == "tune":
                start = place(pretrain(config=config, tokens=tokens), "pretrain").outputs["artifact"]

            def trained(
                label: str, fields: dict[str, Any], start: Any, tune: str = "", candidates: Sequence[Any] = ()
            ) -> Any:
                task = arm(
                    definition=document,
                    config=config,
                    label=label,
                    fields=json.dumps(fields, sort_keys=True),
                    tune=tune,
                    candidates=list(candidates),
                    start=start,
                )
                return place(task, "pretrain").set_display_name(label).outputs

            sweep, tried = definition.sweep, {}
            for each in definition.arms if sweep else ():
                tried[each.name] = [
                    trained(run_label(each.name, seed, value), each.fields | {sweep.field: value, "seed": seed}, start)[
                        "Output"
                    ]
                    for value, seed in product(sweep.values[each.name], sweep.seeds)
                ]
            made: dict[str, Any] = {}
            for each, seed in product(definition.arms, definition.seeds):
                made[run_label(each.name, seed)] = trained(
                    run_label(each.name, seed),
                    each.fields | {"seed": seed},
                    made[run_label(each.after, seed)]["artifact"] if each.after else start,
                    sweep.field if sweep else "",
                    tried.get(each.name, ()),
                )
            runs = [*chain.from_iterable(tried.values()), *(outputs["Output"] for outputs in made.values())]
            last = place(compare(definition=document, config=config, runs=runs), "report")
            last.set_display_name("Compare the arms")

    return ablation
