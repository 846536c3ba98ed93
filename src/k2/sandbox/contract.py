"""What every sandbox takes and gives, wherever it runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Exceeded = Literal["", "time", "memory", "disk", "output"]


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        wall_s: seconds from its start to its end.
        cpu, memory, disk: Kubernetes quantities; disk is its folder and /tmp, each.
        processes: processes and threads at once.
        output_bytes: of standard output and error together; a program that writes more is ended.
    """

    wall_s: float = 10.0
    cpu: str = "1"
    memory: str = "512Mi"
    disk: str = "64Mi"
    processes: int = 64
    output_bytes: int = 65536


@dataclass(frozen=True)
class Result:
    """How a program ended.

    Attributes:
        exit_code: its own; 128 and the signal's number when it was killed.
        output: standard output and error in the order of writing.
        exceeded: the limit that ended it, or nothing.
    """

    exit_code: int
    output: str
    exceeded: Exceeded = ""


class Sandbox(Protocol):
    """A place where programs reach no network, no credential and no file but their own."""

    def run(self, program: Sequence[str], files: Mapping[str, bytes], limits: Limits) -> Result:
        """Run a command in a folder of its own, in which the files are; names may have folders in them.

        Raises:
            UserError: a file's name leads out of the folder, or the files are too many bytes.
            StageError: the program could not be run.
        """
        ...
