"""Which model answers when a stage asks for text; torch-free."""

from typing import Literal

from k2.config.base import Section, setting


class GeneratorConfig(Section):
    """A generator backend. The API key comes only from the environment variable K2_LLM_API_KEY."""

    backend: Literal["embedded", "endpoint"] = setting(
        "embedded", "embedded: SmolLM2-135M-Instruct in this process; endpoint: any OpenAI-compatible server"
    )
    model: str = setting(
        "SmolLM2-135M-Instruct", "name of the model, sent to the endpoint; the embedded backend has one", min_length=1
    )
    url: str | None = setting(
        None,
        "base URL of the endpoint up to and including /v1; K2_LLM_ENDPOINT overrides it",
        semantic=False,
        pattern=r"^https?://[^\s@]+$",
    )
    concurrency: int = setting(16, "requests in flight at the endpoint", semantic=False, ge=1, le=1024)
    timeout_s: float = setting(
        120.0, "seconds without an answer after which a request is retried", semantic=False, gt=0
    )
    retries: int = setting(6, "further attempts after 429, 5xx, timeouts and resets", semantic=False, ge=0, le=20)
    batch_tokens: int = setting(
        24576, "embedded backend: padded prompt plus answer tokens held in one batch (23 kB of cache each)", ge=512
    )
    threads: int | None = setting(
        None, "embedded backend: CPU threads; null leaves torch's choice", semantic=False, ge=1
    )
