"""Generated tokens per second against transformers' generate with its cache, both sides interleaved in one run.

64 new tokens after 32, sampled at temperature 1, at the reference shape; prefill included. Both sides run in float32
and in bfloat16, and the faster of each counts. Beside them run the matrix products of as many decoding steps, which
read every weight they need, and nothing else: `bound` is the ratio that an engine without any other work, prompts
included, would reach with these products, and `products` their share of our time. Prints one JSON row per claim. Time
is this process's CPU time, so that a busy machine spreads the ratios less; of two threads both would count.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from _table import Row, row, run
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from k2.config.model import ModelConfig
from k2.kernels.cpu.decode import Packed, PackedLayer
from k2.model.generate import Engine
from k2.model.hf import to_hf_config
from k2.model.layout import cache_values_per_token
from k2.model.sampling import SamplingConfig
from k2.model.transformer import Transformer

SHAPES = Path(__file__).with_name("shapes.yaml")
PROMPT, NEW = 32, 64
TARGETS = {1: 3.0, 8: 4.0, 64: 5.0}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Step = Callable[[], object]


def own_step(config: ModelConfig, dtype: torch.dtype, prompts: list[list[int]]) -> Step:
    """Our engine on all prompts at once."""
    engine = Engine(Transformer(config, compute_dtype=dtype).initialize(0))
    return lambda: engine.generate(prompts, 1, SamplingConfig(NEW))


def peer_step(config: ModelConfig, dtype: torch.dtype, prompts: list[list[int]]) -> Step:
    """transformers' generate with its cache and its default kernels, weights in `dtype`."""
    model: Any = DeepseekV3ForCausalLM(DeepseekV3Config(**to_hf_config(config)))
    model = model.to(dtype).eval()
    tokens = torch.tensor(prompts)
    options = {"attention_mask": torch.ones_like(tokens), "do_sample": True, "max_new_tokens": NEW, "pad_token_id": 0}
    return lambda: model.generate(tokens, eos_token_id=None, **options)


def products_step(config: ModelConfig, batch: int) -> Step:
    """The matrix products of all decoding steps in bfloat16, in the engine's form, with experts chosen at random."""
    model = Engine(Transformer(config, compute_dtype=torch.bfloat16).initialize(0)).prepared.packed
    assert model is not None, "C does not run here"
    calls = [product_call(model.head, 0, batch)]
    for layer in model.layers:
        for name, packed in layer.products.items():
            rows = expert_rows(config, layer, batch) if name in ("gate_up", "down") else [batch] * len(packed.values)
            calls += [product_call(packed, number, count) for number, count in enumerate(rows) if count]
    return lambda: [call() for _ in range(NEW) for call in calls]


def expert_rows(config: ModelConfig, layer: PackedLayer, batch: int) -> list[int]:
    """Rows of every routed expert, then of shared ones."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(batch, layer.routed, generator=generator).argsort()[:, : config.num_experts_per_tok]
    return torch.bincount(chosen.flatten(), minlength=layer.routed).tolist() + [batch] * layer.shared


def product_call(packed: Packed, number: int, rows: int) -> Step:
    """One product of random rows."""
    x = torch.randn(rows, packed.values.shape[2] * 2).bfloat16()
    return packed.product(x, number, torch.empty(rows, packed.matrices.outputs))


def cpu_seconds(step: Step) -> float:
    """Processor time of one call."""
    start = time.process_time()
    step()
    return time.process_time() - start


def speed(config: ModelConfig, batch: int, rounds: int) -> Row:
    """Run all sides `rounds` times in turn after one warm-up; ratios are peer time over our time."""
    prompts = torch.randint(config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    own = {name: own_step(config, dtype, prompts) for name, dtype in DTYPES.items()}
    peer = {f"transformers {name}": peer_step(config, dtype, prompts) for name, dtype in DTYPES.items()}
    sides = own | peer | {"products": products_step(config, batch)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, step in sides.items():
            seconds = cpu_seconds(step)
            times[name] += [seconds] if number else []  # the first round warms up
    ours, theirs = (min(side, key=lambda name: median(times[name])) for side in (own, peer))
    ratios = [t / o for t, o in zip(times[theirs], times[ours], strict=True)]
    claim = f"generated tokens/s, batch {batch}, ours in {ours}"
    bounds = [t / p for t, p in zip(times[theirs], times["products"], strict=True)]
    shares = [p / o for p, o in zip(times["products"], times[ours], strict=True)]
    speeds = {"tokens_per_cpu_second": round(batch * NEW / median(times[ours])), "bound": round(median(bounds), 2)}
    return row(claim, theirs, ratios, TARGETS[batch]) | speeds | {"products": round(median(shares), 2)}


def cache_bytes() -> Row:
    """Cached values per token and layer at K2's dimensions, against keys and values of all heads."""
    config = ModelConfig()
    full = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    cached = cache_values_per_token(config)
    claim = f"cache per token and layer, {cached} of {full} values"
    return row(claim, "keys and values of all heads", [full / cached], 35.5)


def rows(rounds: int) -> Iterator[Row]:
    """Every claim about generation."""
    config = ModelConfig(**yaml.safe_load(SHAPES.read_text())["reference"]["model"])
    for batch in TARGETS:
        yield speed(config, batch, rounds)
    yield cache_bytes()


if __name__ == "__main__":
    run(__doc__, rows, 9)
