"""From configuration to a generator."""

import os

from k2.config.generator import GeneratorConfig
from k2.generation.protocol import Generator


def build_generator(config: GeneratorConfig) -> Generator:
    """The backend that `config` names. Raises UserError when the endpoint has no URL or the embedded model is missing.

    K2_LLM_ENDPOINT overrides the URL; K2_LLM_API_KEY is the only source of the key.
    """
    if config.backend == "embedded":
        # torch is imported only where it computes
        import torch

        from k2.generation.smollm import SmolLM

        if config.threads is not None:
            torch.set_num_threads(config.threads)
        return SmolLM(config.batch_tokens)
    from k2.generation.openai import Endpoint

    return Endpoint(config, os.environ.get("K2_LLM_ENDPOINT") or config.url, os.environ.get("K2_LLM_API_KEY"))
