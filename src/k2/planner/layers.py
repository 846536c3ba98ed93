"""What a layer of `k2.model` allocates, operation by operation: the one place where the plan knows the model's code.

A row says which tensors an operation reads and makes, which of them its backward pass needs, and what it has besides
while it runs. Bytes follow from shapes alone; lifetimes follow from the rows (`k2.planner.liveness`). Whoever changes
what the code in `k2.model` and `k2.kernels` keeps or allocates changes the row of that operation here.

Rows describe the CPU's code in bfloat16, which is C. On a GPU experts have all their rows at once.
"""

from collections.abc import Iterator
from math import ceil

from k2.planner.operations import FLOAT32, INT64, PANEL, Form, Layer, Operation, Sizes, padded

QUERY_BLOCK = 48
"""Queries that a thread looks at together (causal.c in `k2.kernels.cpu`)."""
MLP_BLOCK = 48
"""Rows that a gated MLP takes through its products together (gemm.h in `k2.kernels.cpu`)."""
NORM_ROWS = 64
"""Rows of a partial sum in the gradient of a norm's weight (`k2.kernels.cpu`)."""


def layer_of(sizes: Sizes, dense: bool) -> Layer:
    """One layer of the model, a dense one or one with experts."""
    model = sizes.model
    operations = [*_attention(sizes), *(_dense(sizes) if dense else _mixture(sizes))]
    hidden, output = model.hidden_size, sizes.values(model.hidden_size)
    branch = "down" if dense else "mixed"
    operations.append(Operation("add", ("middle", branch), {"output": output}, passes=True))
    forms = _norm_forms(sizes, hidden) | _head_forms(sizes) | _fp8_forms(sizes, dense)
    if dense:
        return Layer(tuple(operations), forms)
    scores, one = sizes.balanced * sizes.float32(model.n_routed_experts), sizes.balanced * sizes.float32(1)
    tables = INT64 * sizes.tokens * model.num_experts_per_tok * (1 if sizes.ep == 1 else 4)
    return Layer(tuple(operations), forms, scores, one, float(tables))


def _norm_forms(sizes: Sizes, hidden: int) -> dict[str, Form]:
    if "norms" not in sizes.recompute:
        return {}
    widths = {"normed": hidden, "latent": sizes.model.kv_lora_rank, "normed_again": hidden}
    if sizes.model.q_lora_rank is not None:
        widths["query_latent"] = sizes.model.q_lora_rank
    return {name: Form(back=sizes.values(width) + sizes.float32(1)) for name, width in widths.items()}


def _head_forms(sizes: Sizes) -> dict[str, Form]:
    if "mla_up_projections" not in sizes.recompute:
        return {}
    model = sizes.model
    width = 3 * model.qk_head_dim + model.qk_nope_head_dim + 2 * model.v_head_dim
    together, back = ("queries", "keys", "values"), sizes.values(model.num_attention_heads * width)
    return dict.fromkeys(together, Form(back=back, sources=_sources(sizes), together=together))


def _sources(sizes: Sizes) -> tuple[str, ...]:
    return ("latent", "rotary", "normed" if sizes.model.q_lora_rank is None else "query_latent")


def _fp8_forms(sizes: Sizes, dense: bool) -> dict[str, Form]:
    model, hidden, forms = sizes.model, sizes.model.hidden_size, dict[str, Form]()
    if not sizes.fp8:
        return forms
    if not dense and "norms" not in sizes.recompute:
        forms["normed_again"] = sizes.fp8_form(hidden)
    if "mlp_up_projections" not in sizes.recompute:
        shared = model.intermediate_size if dense else model.moe_intermediate_size * model.n_shared_experts
        forms["gate_up"] = sizes.fp8_form(2 * shared)
        chosen = model.num_experts_per_tok
        forms["routed_gate_up"] = sizes.fp8_form(
            2 * model.moe_intermediate_size, chosen, 0.0 if sizes.cpu else sizes.values(hidden, chosen)
        )
    return forms


def _norm(sizes: Sizes, name: str, source: str, made: str, width: int, whole: bool = True) -> Operation:
    """A norm keeps its input and a number a row; of a part of a tensor it takes a dense copy."""
    partial = FLOAT32 * ceil(sizes.tokens / NORM_ROWS) * width + FLOAT32 * width
    copy = 0.0 if whole else sizes.values(width)
    makes = {made: sizes.values(width), f"{made}_scale": sizes.float32(1)}
    saves = (source, f"{made}_scale")
    gradient = sizes.stays(width)
    return Operation(name, (source,), makes, saves, gradient, copy, sizes.values(width) + partial + copy)


def _projection(sizes: Sizes, name: str, source: str, made: str, inputs: int, outputs: int) -> Operation:
    """Weights are rounded as they are read, into panels."""
    backward = sizes.values(inputs) + max(_outer(sizes, outputs, inputs), sizes.panels(outputs, inputs))
    makes, stays = {made: sizes.values(outputs)}, sizes.stays(inputs * outputs)
    return Operation(name, (source,), makes, (source,), stays, sizes.panels(inputs, outputs), backward)


def _outer(sizes: Sizes, left: int, right: int) -> float:
    """A weight's gradient, and what it takes to make it."""
    return sizes.made(left * right) + _beside_outer(sizes, left, right)


def _beside_outer(sizes: Sizes, left: int, right: int) -> float:
    """A panel of the left factor and all of the right one, or what it takes to add to a sum of another type."""
    packed = sizes.panels(sizes.tokens, PANEL) + sizes.panels(sizes.tokens, right)
    return max(packed, sizes.summed(left * right))


def _attention(sizes: Sizes) -> Iterator[Operation]:
    """Norm, latents, queries, keys and values of every head, attention, output, added to the residual stream."""
    model = sizes.model
    hidden, heads, rank, query_rank = (
        model.hidden_size,
        model.num_attention_heads,
        model.kv_lora_rank,
        model.q_lora_rank,
    )
    rotary, value, width = model.qk_rope_head_dim, model.v_head_dim, model.qk_head_dim
    yield _norm(sizes, "norm", "x", "normed", hidden)
    yield _projection(sizes, "kv_a", "normed", "down_kv", hidden, rank + rotary)
    yield _norm(sizes, "kv_norm", "down_kv", "latent", rank, whole=False)
    key = sizes.values(rotary)
    yield Operation("rotate", ("down_kv",), {"rotary": key}, (), 0.0, key, 2 * key + sizes.values(rank + rotary))
    if query_rank is not None:
        yield _projection(sizes, "q_a", "normed", "down_q", hidden, query_rank)
        yield _norm(sizes, "q_norm", "down_q", "query_latent", query_rank)
    joined, source = (hidden, "normed") if query_rank is None else (query_rank, "query_latent")
    spread = model.qk_nope_head_dim + value
    yield _projection(sizes, "kv_b", "latent", "up_kv", rank, heads * spread)
    yield _projection(sizes, "q_b", source, "up_q", joined, heads * width)
    parts = {
        name: sizes.values(heads * each) for name, each in (("queries", width), ("keys", width), ("values", value))
    }
    gradients = sizes.values(heads * (width + spread) + rotary)
    yield Operation("heads", ("up_q", "up_kv", "rotary"), parts, (), backward=gradients)
    yield _attended(sizes)
    yield _projection(sizes, "o", "attended", "mixed_heads", heads * value, hidden)
    yield Operation("add", ("x", "mixed_heads"), {"middle": sizes.values(hidden)}, passes=True)


def _attended(sizes: Sizes) -> Operation:
    """No probabilities are kept or written; a GPU sums gradients of keys and values in float32."""
    model, inputs, heads = sizes.model, ("queries", "keys", "values"), sizes.model.num_attention_heads
    width, value = model.qk_head_dim, model.v_head_dim
    makes, gradients = {"attended": sizes.values(heads * value)}, sizes.values(heads * (2 * width + value))
    if not sizes.cpu:
        gradients += sizes.float32(heads * (width + value))
        return Operation("attention", inputs, makes, inputs, backward=gradients)
    makes |= {"maxima": sizes.float32(heads), "log_sums": sizes.float32(heads)}
    scratch = causal_scratch(sizes)
    return Operation("attention", inputs, makes, (*inputs, "log_sums"), 0.0, scratch, gradients + scratch)


def causal_scratch(sizes: Sizes) -> float:
    """What one thread works with, for both passes (`k2.kernels.cpu.causal`): packed factors, a block, two totals."""
    model, length = sizes.model, sizes.context
    width, value = model.qk_head_dim, model.v_head_dim
    even, panels = length + length % 2, padded(length)
    packed = panels * (width + value) + even * (padded(width) + padded(value))
    block = QUERY_BLOCK * (6 * even + value + panels + padded(max(width, value)))
    return float(sizes.item * (packed + block) + FLOAT32 * length * (width + value))


def _gated(sizes: Sizes, name: str, width: int, made: str) -> Operation:
    """SwiGLU between two projections, gate and up fused."""
    hidden, again = sizes.model.hidden_size, "mlp_up_projections" in sizes.recompute
    gate_up = sizes.values(2 * width)
    kept = {} if again else {"gate_up": gate_up}
    both = sizes.made(2 * hidden * width) + sizes.made(hidden * width)
    stay = sizes.stays(2 * hidden * width) + sizes.stays(hidden * width)
    later = sizes.values(hidden) + both + sizes.summed(2 * hidden * width)
    forward, backward = (_gated_blocks if sizes.cpu else _gated_rows)(sizes, width, both, again)
    makes, saves = {made: sizes.values(hidden)} | kept, ("normed_again", *kept)
    return Operation(name, ("normed_again",), makes, saves, stay, forward + gate_up * again, max(backward, later))


def _gated_blocks(sizes: Sizes, width: int, both: float, again: bool) -> tuple[float, float]:
    """On a CPU: packed weights, and a block of rows between products; `both` are gradients of weights."""
    hidden, block = sizes.model.hidden_size, float(sizes.item * MLP_BLOCK * 6 * width)
    up, back = sizes.panels(hidden, 2 * width), sizes.panels(2 * width, hidden) + sizes.panels(hidden, width)
    columns = sum(sizes.panels(sizes.tokens, each) for each in (hidden, hidden, 2 * width, width))
    return up + sizes.panels(width, hidden) + block, sizes.values(hidden) + both + up * again + back + columns + block


def _gated_rows(sizes: Sizes, width: int, both: float, again: bool) -> tuple[float, float]:
    """Elsewhere: all rows at once, and a scale for each."""
    hidden, inner, scale = sizes.model.hidden_size, sizes.values(3 * width), sizes.float32(1)
    second = both + max(_beside_outer(sizes, hidden, width), sizes.values(hidden))
    most = max(sizes.values(width), _outer(sizes, 2 * width, hidden), second)
    return sizes.values(width) + scale, inner + scale + most + sizes.values(2 * width) * again


def _dense(sizes: Sizes) -> Iterator[Operation]:
    yield _norm(sizes, "norm", "middle", "normed_again", sizes.model.hidden_size)
    yield _gated(sizes, "dense", sizes.model.intermediate_size, "down")


def _mixture(sizes: Sizes) -> Iterator[Operation]:
    """Norm, router, routed and shared experts, whose sum is added to the residual stream."""
    model, hidden = sizes.model, sizes.model.hidden_size
    yield _norm(sizes, "norm", "middle", "normed_again", hidden)
    yield _router(sizes)
    yield _routed(sizes)
    if model.n_shared_experts:
        yield _gated(sizes, "shared", model.moe_intermediate_size * model.n_shared_experts, "shared")
        both = ("routed", "shared")
        yield Operation("add", both, {"mixed": sizes.values(hidden)}, passes=True)
    else:
        yield Operation("view", ("routed",), {"mixed": 0.0}, passes=True)


def _router(sizes: Sizes) -> Operation:
    """Scores in float32 and those of the chosen, from a widened input, or on a CPU from transposed weights.

    The gradient reaches all scores where there is a balance loss, and else those that were chosen.
    """
    model, hidden = sizes.model, sizes.model.hidden_size
    experts, chosen = model.n_routed_experts, model.num_experts_per_tok
    makes = {
        "scores": sizes.float32(experts),
        "chosen": INT64 * sizes.tokens * chosen,
        "shares": sizes.float32(chosen + model.norm_topk_prob),
        "weights": sizes.float32(chosen),
    }
    wide = 0.0 if sizes.item == FLOAT32 else sizes.float32(hidden)
    forward = float(FLOAT32 * hidden * padded(experts)) if sizes.cpu else wide
    saves = ("normed_again", "scores", "chosen", "shares")
    gradient = FLOAT32 * experts * hidden
    dense = sizes.float32(experts + hidden) + max(wide, sizes.values(hidden))
    sparse = sizes.float32(2 * chosen) + sizes.values(hidden)
    backward = gradient + (sparse if sizes.cpu and not sizes.balanced else dense)
    return Operation("router", ("normed_again",), makes, saves, gradient * sizes.fresh, forward, backward)


def _routed(sizes: Sizes) -> Operation:
    """Routed experts, each with memory for its rows on a CPU; from other ranks come rows that are kept."""
    model, hidden, width = sizes.model, sizes.model.hidden_size, sizes.model.moe_intermediate_size
    chosen, experts = model.num_experts_per_tok, model.n_routed_experts / sizes.ep
    gate_up_weights, down_weights = 2 * hidden * width * experts, hidden * width * experts
    made, stay = (each(gate_up_weights) + each(down_weights) for each in (sizes.made, sizes.stays))
    again = "mlp_up_projections" in sizes.recompute
    gate_up, rows = sizes.values(2 * width, chosen), sizes.values(hidden, chosen)
    order, weights = INT64 * sizes.tokens * chosen, sizes.float32(chosen)
    makes = {"routed": sizes.values(hidden), "row_tokens": float(order)} | (
        {} if sizes.cpu else {"row_weights": weights}
    )
    kept = {} if again else {"routed_gate_up": gate_up}
    if sizes.ep > 1:
        kept["rows"] = sizes.fp8_form(hidden, chosen).kept if sizes.fp8 else rows
    bag = order + 2.0 * INT64 * sizes.tokens
    summed = made + weights + sizes.values(hidden) + sizes.summed(gate_up_weights)
    if sizes.cpu:
        forward = rows + weights + experts_scratch(sizes, False) + gate_up * again
        product = made + sizes.values(hidden) + 3 * weights + rows + experts_scratch(sizes, True)
    else:
        inside = sizes.values(2 * hidden + 4 * width, chosen)
        forward = rows + max(bag, inside) + gate_up * again
        product = made + weights + rows + max(inside + gate_up * again, sizes.values(hidden) + bag)
    saves = ("normed_again", "weights" if sizes.cpu else "row_weights", "row_tokens", *kept)
    reads = ("normed_again", "weights")
    return Operation("routed", reads, makes | kept, saves, stay, forward, max(product, summed))


def experts_scratch(sizes: Sizes, backward: bool) -> float:
    """What one thread works with, for an expert with the mean number of rows (`k2.kernels.cpu.experts`)."""
    model, hidden, inner = sizes.model, sizes.model.hidden_size, sizes.model.moe_intermediate_size
    wide, middle, narrow = (padded(width) for width in (hidden, 2 * inner, inner))
    each = ceil(sizes.tokens * model.num_experts_per_tok * sizes.ep / model.n_routed_experts)
    rows = each * (6 * inner + max(wide, middle) + max(wide, narrow) if backward else inner)
    return float(sizes.item * (rows + wide * middle))
