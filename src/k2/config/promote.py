"""Moving the champion alias."""

from k2.config.base import StageSection, setting


class PromoteConfig(StageSection):
    """Which alias moves is decided by the gate."""

    enabled: bool = setting(True, "false decides and reports, but leaves the alias where it is")
