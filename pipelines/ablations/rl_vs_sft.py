"""Does RL add what more supervision cannot? Three arms from one plateau checkpoint, several seeds, paired intervals.

`python -m pipelines.ablations.rl_vs_sft MODEL_URI FOLDER` runs it on this machine by kfp's local runner.
"""

import json
import sys
from pathlib import Path

import yaml
from kfp import dsl, local
from kfp.dsl import HTML, Dataset, Input, Metrics, Output

CONFIG = json.dumps(yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")))
"""The study as it was run, with fixed step counts."""


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def study_seed(config: str, model: str, seed: int, result: Output[Dataset]) -> None:
    """Run SFT to its plateau and all arms for one seed; `model` is the URI of a pretrained checkpoint artifact."""
    from pathlib import Path

    from k2.rl.ablation import run_component

    Path(result.path).write_text(run_component(config, model, seed))


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def compare(
    results: Input[list[Dataset]], table: Output[Dataset], page: Output[HTML], metrics: Output[Metrics]
) -> None:
    """Pool the seeds into scores, paired differences, CPU seconds, and a page that shows them."""
    import json
    from pathlib import Path

    from k2.rl import ablation_report

    summary = ablation_report.summarize([json.loads(Path(each.path).read_text()) for each in results])
    Path(table.path).write_text(json.dumps(summary, indent=1, sort_keys=True))
    Path(page.path).write_text(ablation_report.page(summary))
    for part, differences in summary["differences"].items():
        for name, difference in differences.items():
            metrics.log_metric(f"{part}/{name}", difference["mean"])


@dsl.pipeline(name="rl-vs-sft", description="RL, more SFT and rejection sampling from one SFT plateau checkpoint.")
def rl_vs_sft(model: str, config: str = CONFIG, seeds: list = [1, 2, 3, 4, 5]) -> None:  # noqa: B006
    """Compare three ways to go on after SFT has stopped helping.

    Args:
        model: URI of the pretrained checkpoint artifact that SFT starts from.
        config: The fields of `k2.config.ablation.RlVsSftConfig` as one JSON object.
        seeds: Seeds of demonstrations, prompts and held-out problems, one independent run each.
    """
    # One seed at a time: neighbours on a machine change the CPU seconds that the study compares.
    with dsl.ParallelFor(seeds, name="seeds", parallelism=1) as seed:
        one = study_seed(config=config, model=model, seed=seed)
        one.set_display_name("Plateau and three arms").set_caching_options(False)
    table = compare(results=dsl.Collected(one.outputs["result"]))
    table.set_display_name("Compare the arms").set_caching_options(False)


def main(model: str, folder: str) -> None:
    """Run the study here, one seed at a time; `folder` keeps each seed's result, the table and the page."""
    from k2.execution.local import object_store

    with object_store():
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=folder)
        rl_vs_sft(model=model)


if __name__ == "__main__":
    main(*sys.argv[1:])
