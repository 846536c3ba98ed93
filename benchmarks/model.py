"""Training path of the model against transformers' DeepseekV3 and against its own bound, interleaved in one run.

Prints one JSON row per claim. Time is this process's CPU time, so that a busy machine spreads the ratios less;
the peer runs with and without bf16 autocast and the faster of the two counts.

Letters in shapes: B batch, L length.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from _table import Row, row, run
from optim import product_floor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from k2.config.base import Kernels
from k2.config.model import ModelConfig
from k2.config.optimizer import OptimizerConfig
from k2.model.attention import attend
from k2.model.backend import use_kernels
from k2.model.hf import to_hf_config
from k2.model.layout import logical_tensors
from k2.model.mla import attention_context
from k2.model.rope import softmax_scale
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.training.batches import NextTokenLoss, micro_batches
from k2.training.loop import train_step
from k2.training.state import TrainState

SHAPES = Path(__file__).with_name("shapes.yaml")
LR = 1e-3
Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A model shape and one random batch for it."""

    config: ModelConfig
    inputs_BL: Tensor
    targets_BL: Tensor


def load_case(name: str, **changes: Any) -> Case:
    """A shape of `shapes.yaml`, fields of its model changed."""
    shape = yaml.safe_load(SHAPES.read_text())[name]
    config = ModelConfig(**shape["model"] | changes)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (shape["batch"], shape["length"] + 1), generator=generator)
    return Case(config, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def cpu_seconds(step: Step) -> float:
    """Processor time of one call, all threads together."""
    start = time.process_time()
    step()
    return time.process_time() - start


def interleave(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every step, all sides in turn; each is timed the second time in a row, as in a training loop.

    The first time it clears pages that the side before gave back to the system: up to a third of a step.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            times[name].append(cpu_seconds(step))
    return times


@dataclass(frozen=True)
class Times:
    """CPU seconds, round by round, of both sides of a claim and of the work that neither can do without."""

    claim: str
    peer: str
    ours: list[float]
    theirs: list[float]
    bound: list[float]

    def rows(self, target: float, share: float | None = None) -> Iterator[Row]:
        """The ratio, the ratio that the bound alone would have, and our share of the bound."""
        alone = "its matrix products + fastest attention + cross-entropy, alone"
        yield row(self.claim, self.peer, quotients(self.theirs, self.ours), target)
        yield row(f"limit of {self.claim}: {alone}", self.peer, quotients(self.theirs, self.bound), None)
        yield row(f"share of the bound, {self.claim}", alone, quotients(self.bound, self.ours), share)


def quotients(over: list[float], under: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def peer_model(config: ModelConfig) -> Any:
    """transformers' model of the same shape with its default kernels."""
    torch.manual_seed(0)
    model: Any = DeepseekV3ForCausalLM(DeepseekV3Config(**to_hf_config(config)))
    return model.eval()


def peer_steps(case: Case, peer: Any) -> dict[str, Step]:
    """Forward and backward of transformers' model, by precision."""

    def step(autocast: bool) -> None:
        peer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = peer(case.inputs_BL, labels=case.inputs_BL, shift_labels=case.targets_BL).loss
        torch.autograd.backward(loss)

    return {"transformers": lambda: step(False), "transformers bf16 autocast": lambda: step(True)}


def own_step(case: Case, model: Transformer) -> Step:
    """Forward and backward of our model."""

    def step() -> None:
        model.zero_grad()
        torch.autograd.backward(model.loss(model(case.inputs_BL)[0], case.targets_BL))

    return step


def own_model(config: ModelConfig) -> Transformer:
    """Float32 masters, bfloat16 compute."""
    return Transformer(config, compute_dtype=torch.bfloat16).initialize(0)


class MatrixProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operands of every matrix product but those of attention, which is measured as a whole."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, noting shapes, strides and types of its factors."""
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen.append((args[-2], args[-1]))
        return func(*args, **kwargs or {})


def matrix_products(case: Case, model: Transformer) -> Step:
    """The step's own products at their shapes, strides and types, on random numbers."""
    use_kernels("torch")  # whose products can be seen; those of `auto` are the same
    with MatrixProducts() as products:
        own_step(case, model)()
    use_kernels("auto")
    pool: dict[Any, Tensor] = {}

    def like(x: Tensor) -> Tensor:
        key = tuple(x.shape), x.stride(), x.dtype
        if key not in pool:
            pool[key] = torch.empty_strided(*key[:2], dtype=x.dtype).normal_()
        return pool[key]

    operands = [(like(a), like(b)) for a, b in products.seen]

    def step() -> None:
        for a, b in operands:
            torch.mm(a, b)

    return step


def attentions(case: Case) -> dict[str, Step]:
    """Forward and backward of all layers' causal attention from ready queries, keys and values: torch's and ours."""
    config, (batch, length) = case.config, case.inputs_BL.shape
    widths = config.qk_head_dim, config.qk_head_dim, config.v_head_dim
    shape = batch, config.num_attention_heads, length
    q, k, v = (torch.randn(*shape, width, dtype=torch.bfloat16, requires_grad=True) for width in widths)
    grad = torch.randn_like(v)
    context = attention_context(config, case.inputs_BL, torch.bfloat16)
    mask = torch.full((length, length), -torch.inf, dtype=torch.bfloat16).triu(1)

    def explicit() -> Tensor:
        logits = q @ k.transpose(-1, -2) * softmax_scale(config) + mask
        return logits.softmax(-1) @ v

    kernels: dict[str, Callable[[], Tensor]] = {
        "attention, torch SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "attention, products and softmax": explicit,
        "attention, ours": lambda: attend(q, k, v, softmax_scale(config), context)[0].transpose(1, 2),
    }

    def layers(kernel: Callable[[], Tensor]) -> None:
        for _ in range(config.num_hidden_layers):
            torch.autograd.grad(kernel(), [q, k, v], grad)

    return {name: partial(layers, kernel) for name, kernel in kernels.items()}


def cross_entropy(case: Case) -> Step:
    """Forward and backward of torch's cross-entropy from ready bfloat16 logits."""
    targets = case.targets_BL.flatten()
    logits = torch.randn(len(targets), case.config.vocab_size, dtype=torch.bfloat16, requires_grad=True)
    return lambda: torch.autograd.grad(F.cross_entropy(logits.float(), targets), logits)


def compare(claim: str, case: Case, ours: Step, peers: dict[str, Step], more: dict[str, Step], rounds: int) -> Times:
    """Rounds of all sides, of the faster peer as "peer" and of what bounds them: `more`, and the forward and backward
    pass's own products, its fastest attention and cross-entropy."""
    parts = {"products": matrix_products(case, own_model(case.config)), "loss": cross_entropy(case)} | more
    kernels = attentions(case)
    times = interleave({"ours": ours} | peers | parts | kernels, rounds)
    peer, attention = (min(sides, key=lambda side: median(times[side])) for sides in (peers, kernels))
    bound = [sum(values) for values in zip(times[attention], *(times[part] for part in parts), strict=True)]
    return Times(claim, peer, times["ours"], times[peer], bound)


def training(
    name: str, rounds: int, target: float, note: str = "", share: float | None = None, **changes: Any
) -> Iterator[Row]:
    """Forward and backward of one batch; `share` is the target for our share of the bound."""
    case = load_case(name, **changes)
    ours, peers = own_step(case, own_model(case.config)), peer_steps(case, peer_model(case.config))
    yield from compare(f"forward+backward, {name} shape{note}", case, ours, peers, {}, rounds).rows(target, share)


def whole_step(rounds: int) -> Iterator[Row]:
    """Forward, backward and optimizer; the optimizer's bound are its products."""
    case = load_case("reference")
    config, rows = case.config, len(case.inputs_BL)
    model, peer = own_model(config), peer_model(config)
    optimizer = MuonClip(model.named_parameters(), logical_tensors(config), OptimizerConfig())
    state = TrainState(model, optimizer)
    batches = micro_batches(case.inputs_BL.numpy(), case.targets_BL.numpy(), rows)
    update = peer_optimizer(peer)

    def with_update(step: Step) -> Step:
        return lambda: (step(), update())

    def ours() -> object:
        return train_step(state, batches, NextTokenLoss(), lambda _: LR)

    peers = {f"{name} + torch.optim.Muon": with_update(step) for name, step in peer_steps(case, peer).items()}
    more = {"update": product_floor(config)}
    yield from compare("whole step with optimizer, reference shape", case, ours, peers, more, rounds).rows(2.0)


def peer_optimizer(peer: Any) -> Step:
    """torch.optim.Muon over each logical matrix, a view of the stacked experts where they are stacked; else AdamW."""
    views: list[tuple[nn.Parameter, nn.Parameter, Any]] = []
    muon: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in peer.named_parameters():
        parts = [(nn.Parameter(parameter.data[index]), parameter, index) for index in _logical_parts(name, parameter)]
        group = rest if parameter.ndim == 1 or "embed" in name or "lm_head" in name else muon
        group += [view for view, _, _ in parts]
        views += parts
    muon_optimizer = torch.optim.Muon(muon, lr=LR, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=LR, fused=True)

    def step() -> None:
        for view, owner, index in views:
            assert owner.grad is not None
            view.grad = owner.grad[index]
        muon_optimizer.step()  # type: ignore[no-untyped-call]
        adamw.step()

    return step


def _logical_parts(name: str, parameter: Tensor) -> list[Any]:
    if parameter.ndim != 3:
        return [...]
    halves = parameter.shape[1] // 2
    rows = [slice(halves), slice(halves, None)] if "gate_up" in name else [slice(None)]
    return [(expert, part) for expert in range(parameter.shape[0]) for part in rows]


def growth(rounds: int) -> Row:
    """384 experts against 16, 8 active, weights resident in bfloat16 with bfloat16 gradients."""
    steps: dict[str, Step] = {}
    for experts in (16, 384):
        case = load_case("reference", n_routed_experts=experts, num_experts_per_tok=8)
        model = own_model(case.config)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        steps[str(experts)] = own_step(case, model)
    times = interleave(steps, rounds)
    claim = "forward+backward, 384 experts against 16, 8 active, bf16 weights"
    return row(claim, "16 experts", quotients(times["384"], times["16"]), 1.6, "lower")


def in_c(name: str, rounds: int) -> Row:
    """The C kernels against torch's operators in the same model."""
    case = load_case(name)
    step = own_step(case, own_model(case.config))

    def with_kernels(choice: Kernels) -> None:
        use_kernels(choice)
        step()

    times = interleave({"auto": partial(with_kernels, "auto"), "torch": partial(with_kernels, "torch")}, rounds)
    use_kernels("auto")
    claim = f"forward+backward, {name} shape, C between the products"
    return row(claim, "torch's operators", quotients(times["torch"], times["auto"]), None)


def peak_bytes(step: Step) -> int:
    """Highest sum of live allocations during the second call above what was live before, by torch's allocator."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    ordered = sorted(changes, key=lambda event: event.start_ns())
    return max(accumulate(int(event.nbytes()) for event in ordered))


def memory() -> Row:
    """Peak of training, gradients and what one step leaves to the next included; the thriftier of the peer's ways."""
    case = load_case("reference")
    model, peer = own_model(case.config), peer_model(case.config)
    ours = peak_bytes(two_steps(own_step(case, model), model))
    theirs = {name: peak_bytes(two_steps(step, peer)) for name, step in peer_steps(case, peer).items()}
    best = min(theirs, key=lambda name: theirs[name])
    claim = f"peak memory of a step above the model, {ours / 2**20:.0f} against {theirs[best] / 2**20:.0f} MiB"
    return row(claim, best, [ours / theirs[best]], 0.6, "lower")


def two_steps(step: Step, model: nn.Module) -> Step:
    """One after the other, from no gradients, nor memory of any, to none."""

    def run() -> None:
        for _ in range(2):
            step()  # forgets the gradients there are
        for _ in range(2):
            model.zero_grad()  # forgets the last ones; then what those left and nobody took

    return run


def rows(rounds: int) -> Iterator[Row]:
    """Every claim about the training path, measured."""
    yield from training("reference", rounds, 1.8, share=0.85)
    yield from training("tiny", rounds, 1.8)
    yield from training("reference", rounds, 2.5, ", 64 experts top 8", n_routed_experts=64, num_experts_per_tok=8)
    yield from whole_step(rounds)
    yield growth(rounds)
    yield from (in_c(name, rounds) for name in ("reference", "tiny"))
    yield memory()


if __name__ == "__main__":
    run(__doc__, rows, 15)
