"""A tiny SFT or RL stage as a program: `python program.py STAGE KEY MODEL_URI TRAJECTORIES_URI [KILL_AFTER]`.

With KILL_AFTER it kills itself (-9) at that many progress updates; it prints the digest of the artifact otherwise.
"""

import os
import sys
from pathlib import Path
from typing import Any

from k2.config.model import ModelConfig
from k2.config.rl import RlConfig
from k2.config.sft import SftConfig
from k2.data.tokenizer import Tokenizer
from k2.execution.contract import StageResult
from k2.model import hf
from k2.model.transformer import Transformer
from k2.stages import rl, sft
from k2.store.artifacts import Artifact, ArtifactWriter, open_uri
from k2.store.client import Store
from k2.store.lease import Lease
from k2.store.work import WorkArea

SHAPE = ModelConfig(
    vocab_size=320,
    hidden_size=16,
    intermediate_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=256,
    initializer_range=0.3,
)
SFT = SftConfig(
    tasks={"addition_1": 1.0},
    demonstrations=32,
    context_length=64,
    batch_size=4,
    micro_batch_size=2,
    steps=7,
    target_accuracy=0.9,
    validation_steps=3,
    validation_items=8,
    lr=1e-3,
    warmup_steps=1,
    evaluation_items=20,
    evaluation_tokens=4,
    checkpoint_steps=2,
)
RL = RlConfig(
    tasks={"addition_1": 1.0},
    general_share=0.2,
    iterations=6,
    prompts=4,
    samples=3,
    updates=2,
    max_tokens=6,
    segment_tokens=4,
    max_prompt_tokens=64,
    ptx_coefficient=0.1,
    ptx_demonstrations=8,
    ptx_context_length=64,
    ptx_batch_size=2,
    micro_batch_tokens=64,
    lr=1e-3,
    warmup_steps=0,
    evaluation_items=10,
    evaluation_interval=2,
    evaluation_curve_items=5,
    checkpoint_iterations=2,
)
TRAJECTORY = (
    b'{"id": "a", "messages": [{"role": "user", "content": "01"}, {"role": "assistant", "content": "23"}],'
    b' "tools": []}\n'
)


def write_model(folder: Path) -> None:
    """A random checkpoint with its tokenizer."""
    hf.save(Transformer(SHAPE).initialize(1), SHAPE, folder)
    text = ["user assistant 0123456789"] * 3
    Tokenizer.train(text, 320, digits_per_token=1, special_slots=20).save(folder / "tokenizer")


class Killing:
    """Progress that ends the process, as the machine might, after so many updates; 0 never does."""

    def __init__(self, after: int) -> None:
        self._left = after

    def update(self, done: float, total: float, unit: str, **values: Any) -> None:
        """Count down."""
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), 9)

    def event(self, kind: str, **values: Any) -> None:
        """Nothing to keep."""


def run_stage(store: Store, stage: str, key: str, inputs: dict[str, Artifact], kill_after: int = 0) -> StageResult:
    """The stage under a key of its own, as the runner would."""
    with Lease(store, f"work/{key}/lease.json") as lease:
        writer = ArtifactWriter(store, stage, key, WorkArea(store, key, lease))
        try:
            if stage == "sft":
                return sft.run(SFT, inputs, writer, progress=Killing(kill_after))
            return rl.run(RL, inputs, writer, progress=Killing(kill_after))
        finally:
            writer.discard()


if __name__ == "__main__":
    stage, key, model, trajectories, kill_after = sys.argv[1:]
    store = Store.from_environment()
    inputs = {"model": open_uri(store, model), "trajectories": open_uri(store, trajectories)}
    print(run_stage(store, stage, key, inputs, int(kill_after)).artifact.digest)
