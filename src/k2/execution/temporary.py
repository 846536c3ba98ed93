"""Where a local run's processes keep their temporary files."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from k2.processes import exists


@contextmanager
def temporary_folder(home: Path) -> Iterator[str]:
    """A folder for `TMPDIR`, removed at the end; those of runs that were killed are removed now.

    `home/temporary` has a link to each, named after the process that it belongs to.
    """
    owners = home / "temporary"
    owners.mkdir(parents=True, exist_ok=True)
    _remove_forsaken(owners)
    with tempfile.TemporaryDirectory(prefix="k2-run-", ignore_cleanup_errors=True) as folder:
        owner = owners / f"{os.getpid()}-{Path(folder).name}"
        owner.symlink_to(folder)
        try:
            yield folder
        finally:
            owner.unlink()


def _remove_forsaken(owners: Path) -> None:
    for owner in owners.glob("*-k2-run-*"):
        if not exists(int(owner.name.partition("-")[0])):
            # Another run may be doing the same.
            shutil.rmtree(owner.resolve(), ignore_errors=True)
            owner.unlink(missing_ok=True)
