"""Artifacts: what is published is complete, what is read is verified, what is broken is noticed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2.store.artifacts import Artifact, ArtifactWriter, CorruptArtifactError, FileEntry, Manifest, find, open_uri
from k2.store.client import Store
from k2.store.lease import Lease, LeaseLostError
from k2.store.work import WorkArea

Make = Callable[..., Artifact]


def stored_object(artifact: Artifact, name: str) -> str:
    return f"{artifact.kind}/{artifact.key}/{artifact.manifest.attempt}/{name}"


def test_round_trip(store: Store, make_artifact: Make) -> None:
    made = make_artifact("corpus", {"a/b.txt": b"hello", "c.json": b'{"x": 1}'}, documents=2)
    again = open_uri(store, made.uri)
    assert again.files == ["a/b.txt", "c.json"]
    assert again.path("a/b.txt").read_bytes() == b"hello"
    assert again.json("c.json") == {"x": 1}
    assert again.statistics == {"documents": 2}
    assert (again.directory() / "c.json").exists()


def test_equal_content_has_equal_digest_and_other_key(make_artifact: Make) -> None:
    one, two = (make_artifact("corpus", {"a": b"1"}) for _ in range(2))
    assert one.digest == two.digest
    assert one.key != two.key
    assert make_artifact("corpus", {"b": b"1"}).digest != one.digest


def test_corruption_is_noticed_by_readers_and_by_cache_hits(store: Store, make_artifact: Make) -> None:
    made = make_artifact("corpus", {"a": b"good"})
    assert made.intact()
    store.put(stored_object(made, "a"), b"evil")
    assert not made.intact()
    with pytest.raises(CorruptArtifactError, match="a is corrupt"):
        made.path("a")


def test_missing_file_is_noticed(store: Store, make_artifact: Make) -> None:
    made = make_artifact("corpus", {"a": b"good"})
    store.delete(stored_object(made, "a"))
    assert not made.intact()


def test_a_damaged_local_copy_is_fetched_anew(store: Store, make_artifact: Make) -> None:
    made = make_artifact("corpus", {"a": b"good"})
    made.path("a").write_bytes(b"evil")
    assert open_uri(store, made.uri).path("a").read_bytes() == b"good"


def test_nothing_is_visible_before_the_manifest(store: Store, make_artifact: Make) -> None:
    made = make_artifact("corpus", {"a": b"good"})
    store.delete(f"corpus/{made.key}/manifest.json")
    assert find(store, "corpus", made.key) is None


def test_who_publishes_second_adopts_the_first(store: Store) -> None:
    with Lease(store, "work/k/lease.json") as lease:
        writers = [ArtifactWriter(store, "corpus", "k", WorkArea(store, "k", lease)) for _ in range(2)]
        for number, writer in enumerate(writers):
            writer.path("a").write_text(str(number))
        first, second = (writer.publish() for writer in writers)
        for writer in writers:
            writer.discard()
    assert second.manifest == first.manifest


def test_a_broken_artifact_is_replaced(store: Store, make_artifact: Make) -> None:
    made = make_artifact("corpus", {"a": b"good"})
    store.delete(stored_object(made, "a"))
    _, etag = store.get_tagged(f"corpus/{made.key}/manifest.json") or (b"", "")
    with Lease(store, f"work/{made.key}/lease.json") as lease:
        writer = ArtifactWriter(store, "corpus", made.key, WorkArea(store, made.key, lease), replaces=etag)
        writer.path("a").write_bytes(b"good")
        mended = writer.publish()
        writer.discard()
    assert mended.intact()
    assert mended.digest == made.digest


def test_a_writer_without_its_lease_publishes_nothing(store: Store) -> None:
    with Lease(store, "work/k/lease.json") as lease:
        writer = ArtifactWriter(store, "corpus", "k", WorkArea(store, "k", lease))
        writer.path("a").write_text("x")
        store.put("work/k/lease.json", b'{"token":9,"owner":"other","host":"h","pid":1,"expires":9e9}')
        with pytest.raises(LeaseLostError):
            writer.publish()
        writer.discard()
    assert find(store, "corpus", "k") is None


entries = st.lists(st.builds(FileEntry, path=st.text(), size=st.integers(0), sha256=st.text(), etag=st.text()))


@given(entries)
def test_digest_depends_on_content_only(files: list[FileEntry]) -> None:
    def digest(order: list[FileEntry], key: str) -> str:
        return Manifest(kind="k", key=key, attempt=key, files=tuple(order)).digest

    assert digest(files, "1") == digest(files[::-1], "2")
    changed = [entry.model_copy(update={"size": entry.size + 1}) for entry in files]
    assert not files or digest(changed, "1") != digest(files, "1")


def test_reading_needs_no_scratch_left(make_artifact: Make, tmp_path: Path) -> None:
    made = make_artifact("corpus", {"a": b"1"})
    made.path("a")
    assert not list(tmp_path.rglob(".a.*"))
