"""Forward plus backward and generation against transformers' DeepseekV3, both sides interleaved in one run.

Prints one JSON row per claim. Time is this process's CPU time, so that a busy machine spreads the ratios less;
the peer runs with and without bf16 autocast and the faster of the two counts.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from k2.config.model import ModelConfig
from k2.model.generate import Engine
from k2.model.hf import to_hf_config
from k2.model.sampling import SamplingConfig
from k2.model.transformer import Transformer

SHAPES = Path(__file__).with_name("shapes.yaml")
Step = Callable[[], object]


def cpu_seconds(step: Step) -> float:
    """Processor time of one call, all threads together."""
    start = time.process_time()
    step()
    return time.process_time() - start


def row(claim: str, ours: Step, peers: dict[str, Step], target: float, rounds: int) -> dict[str, Any]:
    """Run both sides `rounds` times in turn; ratios are peer time over our time, the fastest peer's."""
    times: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
    for number in range(rounds + 1):
        for name, step in {"ours": ours, **peers}.items():
            seconds = cpu_seconds(step)
            times[name] += [seconds] if number else []  # the first round warms up
    fastest = min(peers, key=lambda name: median(times[name]))
    ratios = sorted(peer / own for peer, own in zip(times[fastest], times["ours"], strict=True))
    return {
        "claim": claim,
        "peer": fastest,
        "ratio": round(median(ratios), 3),
        "low": round(ratios[0], 3),
        "high": round(ratios[-1], 3),
        "target": target,
        "better": "higher",
    }


def peer_model(config: ModelConfig) -> Any:
    """transformers' model of the same shape with its default kernels."""
    torch.manual_seed(0)
    model: Any = DeepseekV3ForCausalLM(DeepseekV3Config(**to_hf_config(config)))
    return model.eval()


def training(name: str, shape: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Forward and backward of one batch."""
    config = ModelConfig(**shape["model"])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (shape["batch"], shape["length"] + 1), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    peer = peer_model(config)

    def own_step(model: Transformer) -> None:
        model.zero_grad()
        torch.autograd.backward(model.loss(model(inputs)[0], targets))

    def peer_step(autocast: bool) -> None:
        peer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = peer(inputs, labels=inputs, shift_labels=targets).loss
        torch.autograd.backward(loss)

    own = {t: Transformer(config, compute_dtype=t).initialize(0) for t in (torch.float32, torch.bfloat16)}
    ours = min(own.values(), key=lambda model: min(cpu_seconds(lambda: own_step(model)) for _ in range(3)))
    return row(
        f"forward+backward, {name} shape",
        lambda: own_step(ours),
        {"transformers": lambda: peer_step(False), "transformers bf16 autocast": lambda: peer_step(True)},
        1.8,
        rounds,
    )


def generation(name: str, shape: dict[str, Any], batch: int, target: float, rounds: int) -> dict[str, Any]:
    """64 new tokens after 32, sampled at temperature 1."""
    config = ModelConfig(**shape["model"])
    prompts = torch.randint(config.vocab_size, (batch, 32), generator=torch.Generator().manual_seed(0))
    engine, peer = Engine(Transformer(config).initialize(0)), peer_model(config)

    def peer_step(autocast: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            peer.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                max_new_tokens=64,
                eos_token_id=None,
                pad_token_id=0,
            )

    return row(
        f"generated tokens/s, {name} shape, batch {batch}",
        lambda: engine.generate(prompts.tolist(), 1, SamplingConfig(64)),
        {"transformers": lambda: peer_step(False), "transformers bf16 autocast": lambda: peer_step(True)},
        target,
        rounds,
    )


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """Every claim about the model, measured."""
    shapes = yaml.safe_load(SHAPES.read_text())
    for name, shape in shapes.items():
        yield training(name, shape, rounds)
    for batch, target in ((1, 3.0), (8, 4.0), (64, 5.0)):
        yield generation("reference", shapes["reference"], batch, target, max(2, rounds // 3))


def main() -> None:
    """Print one JSON row per claim."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="measurements per side")
    for result in rows(parser.parse_args().rounds):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
