"""C kernels for a CPU: norms, activation, softmax, loss, heads and the optimizer's passes over its matrices.

What torch does in many operators, each of which reads and writes its tensors, happens in one pass here. Only bfloat16
is served, what training computes in; whoever calls asks `serves` first and has the same in torch's operators.
Results do not depend on the number of threads.

Letters in shapes: N rows, D width, F inner width, G = 2F, M matrices, Q queries, K keys, B batch, H heads, L length,
X query width, Y = nope + V, V value width, R rotary width, T tokens.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn

from k2.kernels.cpu.build import library

PARTIAL_ROWS: Final = 64  # rows of a partial sum in kernels.c
_REAL: Final = (Tensor, nn.Parameter)
_TYPES: Final = {"p": ctypes.c_void_p, "n": ctypes.c_long, "x": ctypes.c_float}
_SIGNATURES: Final = {
    "rms_norm": "ppppnnx",
    "rms_norm_backward": "pppppppnn",
    "scale_rows": "pppnn",
    "gated": "pppnn",
    "gated_backward": "ppppppnn",
    "causal_softmax": "pppnnnnnn",
    "causal_softmax_backward": "ppnnnn",
    "surplus": "pppnn",
    "turned": "pppnnnn",
    "turned_back": "pppnnnn",
    "heads": "pppppppnnnnnnn",
    "heads_backward": "pppppppnnnnnnn",
    "momentum": "pppnnnxx",
    "update": "pppnnnxx",
    "project": "ppppnnnn",
    "log_probabilities": "ppppppnnnn",
    "project_back": "ppppnnnn",
    "outer": "pppppnnnnn",
    "newton_schulz": "p" * 4 + "n" * 7,
    "causal_attention": "p" * 8 + "n" * 6 + "x",
    "causal_attention_backward": "p" * 10 + "n" * 6 + "x",
    "router_scores": "ppppnnn",
    "choose_experts": "pppnnn",
    "order_by_expert": "pppppnnn",
    "sparse_project_back": "ppppnnn",
    "sparse_outer": "ppppnnnn",
    "gated_mlp": "p" * 8 + "n" * 5,
    "gated_mlp_backward": "p" * 16 + "n" * 5,
    "experts_forward": "p" * 12 + "n" * 7,
    "experts_backward": "p" * 17 + "n" * 7,
}


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels take these: real bfloat16 tensors in this machine's memory."""
    for x in tensors:
        if x.dtype != torch.bfloat16 or not is_real(x):
            return False
    return bool(_kernels())


def is_real(x: Tensor) -> bool:
    """Whether a tensor is in this machine's memory, and not a fake one that has none."""
    return x.is_cpu and type(x) in _REAL


@cache
def _kernels() -> dict[str, Callable[..., None]]:
    """The functions of the library, by name; none without a library."""
    found: dict[str, Callable[..., None]] = {}
    for name, signature in _SIGNATURES.items() if (kernels := library()) else ():
        function: Any = getattr(kernels, name)
        function.argtypes, function.restype = [_TYPES[letter] for letter in signature], None
        found[name] = function
    return found


def _run(name: str, *arguments: Tensor | int | float | None) -> None:
    _kernels()[name](*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])


def scratch(name: str, *sizes: int) -> Tensor:
    """Memory [threads, values] of a kernel; its function `name` says how many bfloat16 values a thread needs."""
    kernels = library()
    assert kernels is not None  # for the type: whoever calls has asked `serves`
    needed: Any = getattr(kernels, name)
    needed.argtypes, needed.restype = [ctypes.c_long] * len(sizes), ctypes.c_long
    return torch.empty(torch.get_num_threads(), needed(*sizes), dtype=torch.bfloat16)


def _dense(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) * weight and each row's 1 / rms [N, 1]; the weight is float32."""
    x_ND, weight_D = _dense(x_ND, weight_D)
    out_ND, scale_N1 = torch.empty_like(x_ND), weight_D.new_empty(len(x_ND), 1)
    _run("rms_norm", x_ND, weight_D, out_ND, scale_N1, *x_ND.shape, eps)
    return out_ND, scale_N1


def rms_norm_backward(grad_ND: Tensor, x_ND: Tensor, weight_D: Tensor, scale_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by x and by the weight."""
    grad_ND, x_ND, weight_D = _dense(grad_ND, x_ND, weight_D)
    grad_x, grad_weight = torch.empty_like(x_ND), torch.empty_like(weight_D)
    partial = weight_D.new_empty(-(-len(x_ND) // PARTIAL_ROWS), len(weight_D))
    _run("rms_norm_backward", grad_ND, x_ND, weight_D, scale_N1, grad_x, grad_weight, partial, *x_ND.shape)
    return grad_x, grad_weight


def scale_rows(x_ND: Tensor, scale_N: Tensor, out_ND: Tensor) -> Tensor:
    """Each row times its float32 factor, into a dense `out_ND`."""
    x_ND, scale_N = _dense(x_ND, scale_N)
    _run("scale_rows", x_ND, scale_N, out_ND, *x_ND.shape)
    return out_ND


def gated(gate_up_NG: Tensor, scale_N: Tensor) -> Tensor:
    """silu(first half) * second half of each row, times the row's float32 scale."""
    gate_up_NG, scale_N = _dense(gate_up_NG, scale_N)
    rows, width = gate_up_NG.shape
    out_NF = gate_up_NG.new_empty(rows, width // 2)
    _run("gated", gate_up_NG, scale_N, out_NF, *out_NF.shape)
    return out_NF


def gated_backward(grad_NF: Tensor, gate_up_NG: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by `gate_up_NG` and `scale_N`, and the output once more."""
    grad_NF, gate_up_NG, scale_N = _dense(grad_NF, gate_up_NG, scale_N)
    grad_gate_up, grad_scale, out_NF = (
        torch.empty_like(gate_up_NG),
        torch.empty_like(scale_N),
        torch.empty_like(grad_NF),
    )
    _run("gated_backward", grad_NF, gate_up_NG, scale_N, out_NF, grad_gate_up, grad_scale, *grad_NF.shape)
    return grad_gate_up, grad_scale, out_NF


def causal_softmax(logits_NQK: Tensor, bias_BLL: Tensor | None, row_max_BHL: Tensor, start: int) -> Tensor:
    """Softmax, in place, of logits [B H, Q, K] of the queries from `start` on; query i sees keys 0 to start + i.

    `bias_BLL` [B, L, L] float32 is added; the largest logits go into `row_max_BHL` [B, H, L] float32.
    """
    _, heads, length = row_max_BHL.shape
    _run("causal_softmax", logits_NQK, bias_BLL, row_max_BHL, *logits_NQK.shape, start, heads, length)
    return logits_NQK


def causal_softmax_backward(grad_NQK: Tensor, probabilities_NQK: Tensor, start: int) -> Tensor:
    """Gradient by the logits, in place of the one by the probabilities."""
    _run("causal_softmax_backward", grad_NQK, probabilities_NQK, *grad_NQK.shape, start)
    return grad_NQK


def surplus(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Log-probability [T] float32 of each target; the logits become softmax minus its one-hot."""
    log_probs_T = torch.empty(len(logits_TV), dtype=torch.float32)
    _run("surplus", logits_TV, targets_T, log_probs_T, *logits_TV.shape)
    return log_probs_T


def turned(x_BLR: Tensor, turn_BLR: Tensor) -> Tensor:
    """Interleaved pairs turned by complex64 rotations [B or 1, L, R / 2]: first members, then second ones."""
    return _turned("turned", x_BLR, turn_BLR)


def turned_back(grad_BLR: Tensor, turn_BLR: Tensor) -> Tensor:
    """Gradient by the input of `turned`."""
    return _turned("turned_back", grad_BLR, turn_BLR)


def _turned(name: str, x_BLR: Tensor, turn_BLR: Tensor) -> Tensor:
    x_BLR, turn_BLR = _dense(x_BLR, turn_BLR)
    out_BLR = torch.empty_like(x_BLR)
    _run(name, x_BLR, turn_BLR, out_BLR, *x_BLR.shape, _turns_apart(turn_BLR))
    return out_BLR


def _turns_apart(turn: Tensor) -> int:
    """How far one sequence's angles are from the next one's, or none if all share theirs."""
    return 2 * turn[0].numel() if len(turn) > 1 else 0


def heads(q_BLHX: Tensor, kv_BLHY: Tensor, rotary_BLR: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [B, H, L, X] and values [B, H, L, V], positions turned in.

    `turn` [B or 1, L, 1, R / 2] are complex64 rotations; only queries are turned, the rotary key comes turned.
    """
    q_BLHX, kv_BLHY, rotary_BLR, turn = _dense(q_BLHX, kv_BLHY, rotary_BLR, turn)
    batch, length, number, width = q_BLHX.shape
    values = kv_BLHY.shape[-1] - width + rotary_BLR.shape[-1]
    q_BHLX, k_BHLX = (q_BLHX.new_empty(batch, number, length, width) for _ in range(2))
    v_BHLV = q_BLHX.new_empty(batch, number, length, values)
    sizes = _head_sizes(q_BHLX, v_BHLV, turn)
    _run("heads", q_BLHX, kv_BLHY, rotary_BLR, turn, q_BHLX, k_BHLX, v_BHLV, *sizes)
    return q_BHLX, k_BHLX, v_BHLV


def heads_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by `q_BLHX`, `kv_BLHY` and `rotary_BLR`."""
    grad_q, grad_k, grad_v, turn = _dense(grad_q, grad_k, grad_v, turn)
    batch, number, length, width = grad_q.shape
    rotary = 2 * turn.shape[-1]
    grad_q_BLHX = grad_q.new_empty(batch, length, number, width)
    grad_kv_BLHY = grad_q.new_empty(batch, length, number, width - rotary + grad_v.shape[-1])
    grad_rotary = grad_q.new_empty(batch, length, rotary)
    sizes = _head_sizes(grad_q, grad_v, turn)
    _run("heads_backward", grad_q, grad_k, grad_v, turn, grad_q_BLHX, grad_kv_BLHY, grad_rotary, *sizes)
    return grad_q_BLHX, grad_kv_BLHY, grad_rotary


def _head_sizes(q_BHLX: Tensor, v_BHLV: Tensor, turn: Tensor) -> tuple[int, ...]:
    batch, number, length, width = q_BHLX.shape
    rotary = 2 * turn.shape[-1]
    return batch, length, number, width - rotary, rotary, v_BHLV.shape[-1], _turns_apart(turn)


def momentum(gradient: Tensor, average: Tensor, out_MRC: Tensor, beta: float, nesterov: bool) -> None:
    """average <- beta average + (1 - beta) gradient, and what Muon orthogonalises of it into `out_MRC` (bfloat16).

    Gradient and average are float32 matrices [M, R, C], equally strided, rows and columns contiguous.
    """
    _, rows, columns = out_MRC.shape
    sizes = len(out_MRC), rows * columns, gradient.stride(0)
    _run("momentum", gradient, average, out_MRC, *sizes, 1 - beta, beta if nesterov else 1.0)


def update(weight: Tensor, change_MRC: Tensor, decay: float, rate: float) -> Tensor:
    """weight <- decay weight + rate change, strided as in `momentum`; sum of squares of each matrix of the change."""
    squares_M = torch.empty(len(change_MRC), dtype=torch.float32)
    _, rows, columns = change_MRC.shape
    _run("update", weight, change_MRC, squares_M, len(change_MRC), rows * columns, weight.stride(0), decay, rate)
    return squares_M
