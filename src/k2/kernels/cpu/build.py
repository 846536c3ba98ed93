"""The CPU kernels' library: shipped with the package, or compiled once on this machine.

`python -m k2.kernels.cpu.build [DIR]` compiles it beforehand, into the package or into DIR; images do.
"""

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

SOURCES: Final = tuple(Path(__file__).with_name(name) for name in ("kernels.c", "vectors.h"))
FLAGS: Final = ("-O3", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
LEVELS: Final = {
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
}
"""What a processor must have for gcc's `-march` of that name, best first."""

_log = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled if need be; None, after one warning, where torch's operators have to do."""
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("K2's CPU kernels are not used, training is slower: %s", _reason(error))
        return None


def _built() -> Path:
    name = f"k2-{architecture()}-{_digest()}.so"
    shipped, kept = Path(__file__).with_name(name), _cache() / name
    if shipped.exists():
        return shipped
    if not kept.exists():
        compile_into(kept)
    return kept


def compile_into(path: Path) -> None:
    """Compile for this processor; what is at `path` is whole at any time.

    Raises:
        OSError: no C compiler, or nowhere to write.
        subprocess.CalledProcessError: it does not compile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        command = [compiler, *FLAGS, *_march(), str(SOURCES[0]), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        made.replace(path)


@cache
def architecture() -> str:
    """What this processor's library is called after: a level of x86-64, or the machine's name."""
    if platform.machine() != "x86_64":
        return platform.machine()
    words = set(Path("/proc/cpuinfo").read_text().split()) if sys.platform == "linux" else set()
    return next((level for level, needed in LEVELS.items() if needed <= words), "x86-64")


def _march() -> list[str]:
    return [f"-march={architecture()}"] if platform.machine() == "x86_64" else []


def _digest() -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES) + repr(FLAGS).encode()).hexdigest()[:16]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "k2"


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]} failed: {error.stderr.strip().splitlines()[0]}"
    if isinstance(error, FileNotFoundError):
        return f"no C compiler ({error.filename}); install gcc, or set CC"
    return str(error)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    compile_into(folder / f"k2-{architecture()}-{_digest()}.so")
