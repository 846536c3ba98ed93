"""Does RL add what more supervision cannot? Three arms from one plateau checkpoint, several seeds, paired intervals."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Output


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def study_seed(config: str, model: str, seed: int, result: Output[Dataset]) -> None:
    """Run the plateau and all arms for one seed; `model` is the URI of a pretrained checkpoint artifact."""
    from pathlib import Path

    from k2.rl.ablation import run_component

    Path(result.path).write_text(run_component(config, model, seed))


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def compare(results: Input[list[Dataset]], table: Output[Dataset], metrics: Output[Metrics]) -> None:
    """Pool the seeds into scores, paired differences and CPU seconds."""
    import json
    from pathlib import Path

    from k2.rl.ablation import summarize

    summary = summarize([json.loads(Path(each.path).read_text()) for each in results])
    Path(table.path).write_text(json.dumps(summary, indent=1, sort_keys=True))
    for part, differences in summary["rl_minus"].items():
        for name, difference in differences.items():
            metrics.log_metric(f"rl_minus/{part}/{name}", difference["mean"])


@dsl.pipeline(name="rl-vs-sft", description="RL, more SFT and rejection sampling from one SFT plateau checkpoint.")
def rl_vs_sft(model: str, config: str = "{}", seeds: list = [1, 2, 3, 4, 5]) -> None:  # noqa: B006
    """Compare three ways to go on after SFT has stopped helping.

    Args:
        model: URI of the pretrained checkpoint artifact that SFT starts from.
        config: Fields that differ from the study's defaults, as one JSON object.
        seeds: Seeds of demonstrations, prompts and held-out problems, one independent run each.
    """
    with dsl.ParallelFor(seeds, name="seeds") as seed:
        one = study_seed(config=config, model=model, seed=seed)
        one.set_display_name("Plateau and three arms").set_caching_options(False)
    table = compare(results=dsl.Collected(one.outputs["result"]))
    table.set_display_name("Compare the arms").set_caching_options(False)
