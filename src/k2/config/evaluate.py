"""What is measured of the base, SFT, RL and INT4 models, side by side."""

from k2.config.base import StageSection, setting


class EvaluateConfig(StageSection):
    """Held-out loss, verifiable tasks on unseen prompts, and tool calls where training never was."""

    tasks: tuple[str, ...] = setting(("addition_2", "tool_call"), "verifiable tasks, on their held-out prompts")
    items: int = setting(2000, "prompts of each task", ge=1)
    temperature: float = setting(1.0, "temperature of the sampled accuracy, beside the greedy one", gt=0, le=10)
    max_tokens: int = setting(256, "longest answer in tokens", ge=1)
    tool_items: int = setting(500, "prompts of each tool-call benchmark on held-out servers and domains", ge=1)
    heldout_tokens: int = setting(1_000_000, "held-out tokens whose loss is measured, at most", ge=16)
    context_length: int = setting(4096, "tokens of context for the held-out loss", ge=8)
    samples: int = setting(4, "answers of the final model shown in the report", ge=0)
    batch_size: int = setting(64, "sequences at once", semantic=False, ge=1)
