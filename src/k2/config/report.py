"""Configuration of the report on a run."""

from typing import Literal

from k2.config.base import StageSection, setting


class ReportConfig(StageSection):
    """Which run to report on. Nothing here decides the bytes of a model."""

    run: str = setting(
        "local", "id of the run to report on", semantic=False, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
    )
    preset: str = setting("tiny", "preset the run started from", semantic=False, min_length=1)
    status: Literal["running", "done", "failed", "interrupted"] = setting(
        "done", "how the run ended: running, done, failed or interrupted", semantic=False
    )
    examples: int = setting(3, "rewrites of each kind that the report shows side by side", semantic=False, ge=0, le=20)
