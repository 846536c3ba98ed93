"""Ahead-of-time compilation without a GPU: what a kernel costs in registers and shared memory on an architecture.

Needs a process without TRITON_INTERPRET. The assembler is the one Triton ships.
"""

import contextlib
import hashlib
import io
import re
import tempfile
from dataclasses import dataclass
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from k2.kernels.launch import Launch

TENSOR_CORE = {"wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma\.", "mma": r"\bmma\.sync"}
ASSEMBLER = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
LOCATION = re.compile(r"^#loc.*\n| loc\((?:[^()]|\([^()]*\))*\)", re.MULTILINE)
"""Where a line of IR comes from: paths and line numbers, which are no part of the code."""
ALIGNMENT = 16
"""Triton knows of an integer whether 16 divides it; pointers are taken to be aligned so."""


@dataclass(frozen=True)
class Budget:
    """What one kernel takes on one architecture.

    tensor_columns: of the tensor memory of sm_100. tensor_core: matrix instructions in the PTX, counted by name.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    tensor_columns: int
    warps: int
    stages: int
    tensor_core: dict[str, int]


def source(launch: Launch, arch: int) -> ASTSource:
    """The kernel with its arguments specialised as Triton's launcher would: 1 is a constant, 16 divides or not."""
    constants = {**launch.tile(arch).sizes, **launch.constants}
    constants |= {name: 1 for name, value in launch.arguments.items() if value == 1}
    constants = {name: value for name, value in constants.items() if name in launch.kernel.arg_names}
    signature, aligned = {}, {}
    for position, name in enumerate(launch.kernel.arg_names):
        value = "constexpr" if name in constants else launch.arguments[name]
        signature[name] = value if isinstance(value, str) else ("i64" if value >= 2**31 else "i32")
        if str(value).startswith("*") or (isinstance(value, int) and value % ALIGNMENT == 0):
            aligned[(position,)] = [["tt.divisibility", ALIGNMENT]]
    return ASTSource(launch.kernel, signature, constexprs=constants, attrs=aligned)


def fingerprint(launch: Launch, arch: int) -> str:
    """SHA-256 of everything the machine code is made from: Triton's version, options and the kernel's own IR."""
    target = GPUTarget("cuda", arch, 32)
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(_options(launch, arch))
    module = source(launch, arch).make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    text = f"{triton.__version__} {arch} {sorted(_options(launch, arch).items())} {LOCATION.sub('', str(module))}"
    return hashlib.sha256(text.encode()).hexdigest()


def compile_launch(launch: Launch, arch: int) -> tuple[Budget, Any]:
    """Compile for `arch`; the budget, and Triton's kernel with its `asm`."""
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        triton.knobs.cache.dir, triton.knobs.nvidia.dump_ptxas_log = cache, True
        with contextlib.redirect_stdout(log):
            kernel = triton.compile(
                source(launch, arch), target=GPUTarget("cuda", arch, 32), options=_options(launch, arch)
            )
    stack, stores, loads = map(int, _found(ASSEMBLER, log.getvalue()))
    (registers,) = map(int, _found(REGISTERS, log.getvalue()))
    counts = {name: len(re.findall(pattern, kernel.asm["ptx"])) for name, pattern in TENSOR_CORE.items()}
    tile, metadata = launch.tile(arch), kernel.metadata
    budget = Budget(
        registers=registers,
        spill_bytes=stores + loads,
        stack_bytes=stack,
        shared_bytes=metadata.shared,
        tensor_columns=metadata.tmem_size or 0,
        warps=tile.num_warps,
        stages=tile.num_stages,
        tensor_core={name: count for name, count in counts.items() if count},
    )
    return budget, kernel


def _options(launch: Launch, arch: int) -> dict[str, int]:
    tile = launch.tile(arch)
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _found(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    match = pattern.search(text)
    if match is None:
        raise RuntimeError(f"the assembler did not report {pattern.pattern!r}:\n{text}")
    return match.groups()
