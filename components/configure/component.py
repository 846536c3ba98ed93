"""KFP component that resolves what people filled in into one validated configuration."""

from kfp import dsl


@dsl.component(base_image="k2-python-cpu:dev", install_kfp_package=False)
def configure(preset: str, overrides: str, run: str, job: str) -> str:
    """Validate the preset and the overrides before anything is spent; returns the configuration as JSON."""
    from k2.execution.component import resolve_config

    return resolve_config(preset, overrides, run or job)
