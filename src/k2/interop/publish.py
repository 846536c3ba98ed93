"""An imported checkpoint as an artifact, so that stages can start from it."""

import hashlib
import shutil
from pathlib import Path

from k2.config.base import canonical_json
from k2.interop.digests import read_request, verified
from k2.store.artifacts import Artifact, ArtifactWriter, find
from k2.store.client import Store
from k2.store.lease import Lease
from k2.store.work import WorkArea

KIND = "import"


def publish(folder: Path, store: Store) -> Artifact:
    """Upload a folder that `import_checkpoint` made; its key is the SHA-256 of what it was made from and how.

    Raises UserError when a file is not what the manifest says.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    verified(folder, names)
    request = read_request(folder)
    key = hashlib.sha256(canonical_json(request).encode()).hexdigest()
    with Lease(store, f"work/{key}/lease.json") as lease:
        present = find(store, KIND, key)
        if present is not None and present.intact():
            return present
        stale = store.get_tagged(f"{KIND}/{key}/manifest.json")
        work = WorkArea(store, key, lease)
        writer = ArtifactWriter(store, KIND, key, work, {"request": request}, stale[1] if stale else None)
        try:
            for name in names:
                shutil.copyfile(folder / name, writer.path(name))
            return writer.publish()
        finally:
            writer.discard()
