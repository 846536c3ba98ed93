"""The CPU kernels' library: shipped with the package, or compiled once on this machine.

`python -m k2.kernels.cpu.build` compiles it beforehand into the package, for all processors of this kind; images do.
"""

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

SOURCES: Final = tuple(sorted(Path(__file__).parent.glob("*.[ch]")))
FLAGS: Final = ("-O3", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
_V4: Final = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
LEVELS: Final = {
    "x86-64-v4+avx512bf16": _V4 | {"avx512_bf16"},
    "x86-64-v4": _V4,
    "x86-64-v3": {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
}
"""What a processor must have for gcc's `-march` of that name and the extensions after it, best first."""

_log = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled if need be; None, after one warning, where torch's operators have to do."""
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("K2's CPU kernels are not used, training and generation are slower: %s", _reason(error))
        return None


def _built() -> Path:
    found = (folder / _name(architecture()) for folder in (Path(__file__).parent, _cache()))
    return next((path for path in found if path.exists()), None) or build(_cache(), architecture())


def build(folder: Path, target: str) -> Path:
    """Compile for processors called `target`, as `architecture` has it; the library is there whole or not at all.

    Raises:
        OSError: no C compiler, or nowhere to write.
        subprocess.CalledProcessError: it does not compile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        made = Path(aside, _name(target))
        sources = [str(path) for path in SOURCES if path.suffix == ".c"]
        command = [*compiler(target), *sources, "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        return made.replace(folder / made.name)


def compiler(target: str) -> list[str]:
    """The compiler and its options for such processors."""
    level, *extensions = target.split("+")
    march = [f"-march={level}", *(f"-m{name}" for name in extensions)] if level.startswith("x86-64") else []
    return [*os.environ.get("CC", "cc").split(), *FLAGS, *march]


@cache
def architecture() -> str:
    """What this processor's library is called after: a level of x86-64, or the machine's name."""
    if platform.machine() != "x86_64":
        return platform.machine()
    words = set(Path("/proc/cpuinfo").read_text().split()) if sys.platform == "linux" else set()
    return next((level for level, needed in LEVELS.items() if needed <= words), "x86-64")


def _name(target: str) -> str:
    content = b"".join(path.read_bytes() for path in SOURCES) + repr(FLAGS).encode()
    return f"k2-{target}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "k2"


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        return f"{error.cmd[0]} failed: {lines[0]}"
    if isinstance(error, FileNotFoundError):
        return f"no C compiler ({error.filename}); install gcc, or set CC"
    return str(error)


if __name__ == "__main__":
    for target in LEVELS if platform.machine() == "x86_64" else (architecture(),):
        print(build(Path(__file__).parent, target))
