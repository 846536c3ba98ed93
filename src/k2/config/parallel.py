"""How the ranks of a distributed stage divide the work, and what they do about faults."""

from k2.config.base import Section, setting


class ParallelConfig(Section):
    """Degrees of parallelism; data parallelism takes the ranks that are left. Of several ranks the last bits differ."""

    pipeline_parallel_size: int = setting(1, "pipeline stages (Kimi K2: 16)", ge=1)
    virtual_stages: int = setting(1, "pieces of the model on each pipeline rank, for interleaved 1F1B", ge=1)
    expert_parallel_size: int = setting(1, "ranks that divide the routed experts of a stage (Kimi K2: 16)", ge=1)
    hang_timeout_s: float = setting(1200.0, "a rank that makes no progress for so long ends the attempt", gt=0)
