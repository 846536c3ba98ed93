"""What a layer of `k2.model` allocates, operation by operation: the one place where the plan knows the model's code.

A row says which tensors an operation reads and makes, which of them its backward pass needs, and what it has besides
while it runs. Bytes follow from shapes alone; lifetimes follow from the rows (`k2.planner.liveness`). Whoever changes
what the code in `k2.model` and `k2.kernels` keeps or allocates changes the row of that operation here.

Rows describe the CPU's code in bfloat16, C included. On a GPU attention has no logits, and experts have all their rows
at once.
"""

from collections.abc import Iterator
from math import ceil, prod

from k2.planner.operations import FLOAT32, INT64, Form, Layer, Operation, Sizes

COMPLEX64 = 8
QUERY_BLOCK = 128
"""Queries whose probabilities are one tensor (`k2.model.mla`), with the keys up to its end."""
PANEL = 64
"""Columns of a packed factor of a product (`k2.kernels.cpu.gemm`)."""
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
        forms["routed_gate_up"] = sizes.fp8_form(2 * model.moe_intermediate_size, chosen, sizes.values(hidden, chosen))
    return forms


def _norm(sizes: Sizes, name: str, source: str, made: str, width: int, whole: bool = True) -> Operation:
    """A norm keeps its input and a number a row; of a part of a tensor it takes a dense copy."""
    partial = FLOAT32 * ceil(sizes.tokens / NORM_ROWS) * width
    copy = 0.0 if whole else sizes.values(width)
    makes = {made: sizes.values(width), f"{made}_scale": sizes.float32(1)}
    saves = (source, f"{made}_scale")
    return Operation(name, (source,), makes, saves, width, copy, sizes.values(width) + partial + copy)


def _projection(sizes: Sizes, name: str, source: str, made: str, inputs: int, outputs: int) -> Operation:
    """Weights are rounded as they are read, into panels."""
    backward = sizes.values(inputs) + max(_outer(sizes, inputs, outputs), _panels(sizes, outputs, inputs))
    makes, weights = {made: sizes.values(outputs)}, inputs * outputs
    return Operation(name, (source,), makes, (source,), weights, _panels(sizes, inputs, outputs), backward)


def _panels(sizes: Sizes, summed: float, columns: int) -> float:
    """A packed factor of a product on a CPU."""
    return sizes.item * summed * PANEL * ceil(columns / PANEL) if sizes.cpu else 0.0


def _outer(sizes: Sizes, *columns: int) -> float:
    """A weight's gradient, and its packed factors or what it takes to add it to a sum of another type."""
    packed = sum(_panels(sizes, sizes.tokens, each) for each in columns)
    return sizes.parameter * prod(columns) + max(packed, sizes.summed(prod(columns)))


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
    table = COMPLEX64 * sizes.context * rotary / 2
    yield _norm(sizes, "norm", "x", "normed", hidden)
    yield _projection(sizes, "kv_a", "normed", "down_kv", hidden, rank + rotary)
    yield _norm(sizes, "kv_norm", "down_kv", "latent", rank, whole=False)
    turning = 3 * sizes.float32(rotary)
    makes = {"rotary": sizes.values(rotary), "turn": table}
    yield Operation("rotate", ("down_kv",), makes, ("turn",), 0.0, turning, turning + sizes.values(rank + rotary))
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
    yield Operation("heads", ("up_q", "up_kv", "rotary"), {**parts, "turns": table}, ("turns",), backward=gradients)
    yield _attended(sizes)
    yield _projection(sizes, "o", "attended", "mixed_heads", heads * value, hidden)
    yield Operation("add", ("x", "mixed_heads"), {"middle": sizes.values(hidden)}, passes=True)


def _attended(sizes: Sizes) -> Operation:
    model, inputs = sizes.model, ("queries", "keys", "values")
    makes = {"attended": sizes.values(model.num_attention_heads * model.v_head_dim)}
    if not sizes.cpu:
        width, value = model.qk_head_dim, model.v_head_dim
        gradients = sizes.item * (2 * width + value) + FLOAT32 * (width + value)
        return Operation(
            "attention", inputs, makes, inputs, backward=sizes.tokens * model.num_attention_heads * gradients
        )
    blocks = _Blocks(sizes)
    kept = {} if blocks.dropped else {"probabilities": sum(blocks.sizes)}
    makes |= {"maxima": sizes.float32(model.num_attention_heads)}
    saves = (*inputs, *kept)
    return Operation("attention", inputs, makes | kept, saves, 0.0, blocks.forward(), blocks.backward())


class _Blocks:
    """Attention by blocks of queries against the keys up to their end, on a CPU."""

    def __init__(self, sizes: Sizes) -> None:
        model, context = sizes.model, sizes.context
        self.item = sizes.item
        self.rows = sizes.tokens / context * model.num_attention_heads
        self.stops = [min(start + QUERY_BLOCK, context) for start in range(0, context, QUERY_BLOCK)]
        self.queries = [stop - start for start, stop in zip([0, *self.stops], self.stops, strict=False)]
        self.sizes = [self.item * self.rows * q * k for q, k in zip(self.queries, self.stops, strict=True)]
        self.width, self.value, self.context = model.qk_head_dim, model.v_head_dim, context
        self.dropped = "attention_probabilities" in sizes.recompute

    def forward(self) -> float:
        """Probabilities of a block, and of the one before while nobody keeps them; its queries, and what it gives."""
        block = self.item * self.rows * self.queries[0]
        last = self.sizes[-1] + (self.sizes[-2] if len(self.sizes) > 1 else 0.0)
        return block * max(self.width, self.value) + last * self.dropped

    def backward(self) -> float:
        """The longest block comes first; totals of several are float32."""
        item, rows, both = self.item, self.rows, self.width + self.value
        longest, *others = [self.sizes[-1], *self.sizes[:-1]]
        queries = item * rows * self.context * self.width
        given = item * rows * self.queries[0] * self.value
        again = 1 + self.dropped
        most = queries + given + again * longest + item * rows * self.context * both
        before = longest
        total = item * rows * self.context * both
        for stop, block in zip(self.stops, others, strict=False):
            part = (item + FLOAT32) * rows * stop * max(self.width, self.value)
            wide = FLOAT32 * rows * self.context * both
            began = queries + 2 * given + total + before + again * block
            if total != wide:
                added = queries + given + again * block + wide + item * rows * self.context * self.width + part
            else:
                added = queries + given + again * block + wide + part
            most, before, total = max(most, began, added), block, wide
        narrowed = item * rows * self.context * both if others else 0.0
        return max(most, queries + given + again * before + total + narrowed)


def _gated(sizes: Sizes, name: str, width: int, made: str) -> Operation:
    """SwiGLU between two projections, gate and up fused."""
    hidden, again = sizes.model.hidden_size, "mlp_up_projections" in sizes.recompute
    gate_up, one = sizes.values(2 * width), sizes.float32(1)
    kept = {} if again else {"gate_up": gate_up}
    activation = sizes.values(4 * width) + one
    first = sizes.values(3 * width) + one + _outer(sizes, 2 * width, hidden)
    both = sizes.parameter * 3 * hidden * width
    back = max(_outer(sizes, hidden, width) - sizes.parameter * hidden * width, sizes.values(hidden))
    second = sizes.values(3 * width) + one + both + max(back, sizes.values(hidden) + _panels(sizes, 2 * width, hidden))
    later = sizes.values(hidden) + both + sizes.summed(2 * hidden * width)
    makes = {made: sizes.values(hidden), "ones": one} | kept
    forward = (
        sizes.values(width) + max(_panels(sizes, hidden, 2 * width), _panels(sizes, width, hidden)) + gate_up * again
    )
    backward = max(max(activation, first, second) + gate_up * again, later)
    saves = ("normed_again", "ones", *kept)
    return Operation(name, ("normed_again",), makes, saves, 3 * hidden * width, forward, backward)


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
    """Scores in float32 from an input that is widened for a while, in both passes, and the weights of those chosen."""
    model, hidden = sizes.model, sizes.model.hidden_size
    experts, chosen = model.n_routed_experts, model.num_experts_per_tok
    shares = sizes.float32(chosen + 1) if model.norm_topk_prob else 0.0
    makes = {
        "scores": sizes.float32(experts),
        "chosen": INT64 * sizes.tokens * chosen,
        "shares": shares,
        "weights": sizes.float32(chosen),
    }
    wide = 0.0 if sizes.item == FLOAT32 else sizes.float32(hidden)
    backward = sizes.float32(experts + hidden) + max(wide, sizes.values(hidden)) + FLOAT32 * experts * hidden
    saves = ("normed_again", "scores", "chosen", "shares")
    forward = wide + sizes.float32(experts)
    return Operation("router", ("normed_again",), makes, saves, experts * hidden, forward, backward)


def _routed(sizes: Sizes) -> Operation:
    """Routed experts, each with memory for its rows on a CPU; from other ranks come rows that are kept."""
    model, hidden, width = sizes.model, sizes.model.hidden_size, sizes.model.moe_intermediate_size
    chosen, experts = model.num_experts_per_tok, model.n_routed_experts / sizes.ep
    weights, again = 3 * hidden * width * experts, "mlp_up_projections" in sizes.recompute
    gate_up, rows = sizes.values(2 * width, chosen), sizes.values(hidden, chosen)
    order = INT64 * sizes.tokens * chosen
    makes = {"routed": sizes.values(hidden), "row_weights": sizes.float32(chosen), "row_tokens": float(order)}
    kept = {} if again else {"routed_gate_up": gate_up}
    if sizes.ep > 1:
        kept["rows"] = sizes.fp8_form(hidden, chosen).kept if sizes.fp8 else rows
    bag = order + 2.0 * INT64 * sizes.tokens
    inside = _scratch(sizes) if sizes.cpu else sizes.values(2 * hidden + 4 * width, chosen)
    grads = sizes.parameter * weights + sizes.float32(chosen)
    product = grads + rows + max(inside + gate_up * again * (not sizes.cpu), sizes.values(hidden) + bag)
    summed = grads + sizes.values(hidden) + sizes.summed(2 * weights / 3)
    saves, forward = ("normed_again", "row_weights", "row_tokens", *kept), rows + max(bag, inside) + gate_up * again
    reads = ("normed_again", "weights")
    return Operation("routed", reads, makes | kept, saves, weights, forward, max(product, summed))


def _scratch(sizes: Sizes) -> float:
    """What one thread works with, for an expert with the mean number of rows (`k2.kernels.cpu.experts`)."""
    model, hidden, inner = sizes.model, sizes.model.hidden_size, sizes.model.moe_intermediate_size
    wide, middle, narrow = (PANEL * ceil(width / PANEL) for width in (hidden, 2 * inner, inner))
    each = ceil(sizes.tokens * model.num_experts_per_tok * sizes.ep / model.n_routed_experts)
    rows = each * (hidden + 6 * inner + max(wide, middle) + max(wide, narrow))
    return float(sizes.item * (rows + wide * middle))
