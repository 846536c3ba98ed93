"""Where a local run's processes keep their temporary files."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from k2.errors import UserError
from k2.processes import exists

PREFIX = "k2-run-"
LONGEST = 107 - len(f"/{PREFIX}12345678/pymp-12345678/listener-12345678")
"""Bytes of `TMPDIR`: a socket's path has 107 at most, and multiprocessing of Python puts sockets into folders there."""


@contextmanager
def temporary_folder(home: Path) -> Iterator[str]:
    """A folder for `TMPDIR`, removed at the end; those of runs that were killed are removed now.

    `home/temporary` has a link to each, named after the process that it belongs to.

    Raises:
        UserError: the machine's folder of temporary files has too long a path for sockets in it.
    """
    _check_length(tempfile.gettempdir())
    owners = home / "temporary"
    owners.mkdir(parents=True, exist_ok=True)
    _remove_forsaken(owners)
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder:
        owner = owners / f"{os.getpid()}-{Path(folder).name}"
        owner.symlink_to(folder)
        try:
            yield folder
        finally:
            owner.unlink()


def _check_length(parent: str) -> None:
    if (length := len(os.fsencode(parent))) > LONGEST:
        raise UserError(f"TMPDIR: {parent} has {length} bytes, but steps' sockets allow {LONGEST}; set a shorter one")


def _remove_forsaken(owners: Path) -> None:
    for owner in owners.glob(f"*-{PREFIX}*"):
        if not exists(int(owner.name.partition("-")[0])):
            # Another run may be doing the same.
            shutil.rmtree(owner.resolve(), ignore_errors=True)
            owner.unlink(missing_ok=True)
