"""KFP component that resolves an ablation study into the configuration all its arms share."""

from kfp import dsl


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def study(definition: str, preset: str, overrides: str, run: str, job: str) -> str:
    """Validate the preset, the study's setting, the overrides and every arm; returns the configuration as JSON."""
    from k2.ablations.component import resolve

    return resolve(definition, preset, overrides, run or job)
