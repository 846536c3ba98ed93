"""What is measured of the base, SFT, RL and INT4 models, side by side."""

from typing import Literal

from k2.config.base import StageSection, setting


class EvaluateConfig(StageSection):
    """Held-out loss, verifiable tasks on unseen prompts, and tool calls where training never was."""

    tasks: tuple[str, ...] = setting(
        (
            "addition_3",
            "multiplication_2",
            "reasoning_gym/chain_sum",
            "reasoning_gym/gcd",
            "reasoning_gym/letter_counting",
            "reasoning_gym/spell_backward",
            "tool_call",
        ),
        "verifiable tasks, each on the held-out side of its problems",
        min_length=1,
    )
    items: int = setting(2000, "problems of each task that is not about tool calls", ge=1)
    max_tokens: int = setting(256, "longest answer in tokens", ge=1)
    tool_items: int = setting(
        500, "problems of each tool-call task: the known tools, held-out servers, held-out domains", ge=1
    )
    heldout_tokens: int = setting(1_000_000, "held-out tokens whose perplexity is measured, at most", ge=16)
    context_length: int = setting(4096, "tokens of context for the perplexity", ge=8)
    samples: int = setting(4, "answers of each model to each task that the report shows", ge=0)
    precision: Literal["bfloat16", "float32"] = setting("bfloat16", "type of activations")
