"""Garbage collection: what must stay stays, what nothing needs goes, and killed anywhere it leaves a valid store."""

import json
import os
import subprocess
import sys
import time
import uuid
from typing import Any

import networkx
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from k2.cli import main
from k2.errors import StageError, UserError
from k2.monitoring.lineage import lineage, walk
from k2.monitoring.run_record import write_stage_record
from k2.store import sweep
from k2.store.aliases import move_alias, read_alias
from k2.store.artifacts import Artifact, ArtifactWriter, Manifest, find, open_uri
from k2.store.client import ObjectInfo, Store
from k2.store.gc import DAY_S, HOUR_S, Inventory, Policy, Published, make_plan, reachable, take_inventory
from k2.store.lease import Holder, Lease, reading
from k2.store.work import WorkArea

KINDS = ("corpus", "pretrain")
NOTHING_IS_NEW = Policy(days=30, grace_hours=0)
NOW = 1e9


def publish(store: Store, *inputs: Artifact, kind: str = "pretrain", key: str | None = None) -> Artifact:
    key = key or uuid.uuid4().hex
    provenance = {"inputs": {str(number): each.uri for number, each in enumerate(inputs)}}
    with Lease(store, f"work/{key}/lease.json") as lease:
        writer = ArtifactWriter(store, kind, key, WorkArea(store, key, lease), provenance)
        writer.path("model/weights").write_bytes(key.encode())
        try:
            return writer.publish()
        finally:
            writer.discard()


def collect(store: Store, policy: Policy = NOTHING_IS_NEW) -> sweep.Swept:
    made = sweep.plan(store, KINDS, policy)
    return sweep.apply(store, KINDS, made.digest, settle_s=0)


def published(store: Store) -> set[str]:
    return {each.name for each in take_inventory(store, KINDS, NOTHING_IS_NEW).artifacts if not each.condemned}


def name(artifact: Artifact) -> str:
    return f"{artifact.kind}/{artifact.key}"


def test_the_champion_stays_with_all_it_was_made_from(store: Store) -> None:
    corpus = publish(store, kind="corpus")
    old, champion, other = publish(store, corpus), publish(store, corpus), publish(store)
    move_alias(store, read_alias(store, "champion"), champion)
    made = sweep.plan(store, KINDS, NOTHING_IS_NEW)
    assert [(each.name, each.why) for each in made.kept] == [(champion.uri, "alias champion")]
    assert {item.name.rpartition("/")[0] for item in made.items} == {name(old), name(other)}
    assert all(item.bytes == 32 and item.objects == 2 for item in made.items)
    swept = sweep.apply(store, KINDS, made.digest, settle_s=0)
    assert (len(swept.removed), swept.bytes, swept.restored, swept.skipped) == (2, 64, (), ())
    assert published(store) == {name(corpus), name(champion)}
    assert all(open_uri(store, node["uri"]).intact() for node in walk(lineage(store, champion.uri)))
    left = {info.name.split("/")[1] for info in store.list("pretrain/")}
    assert left == {champion.key}


def test_leases_of_done_work_and_old_plans_do_not_pile_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    champion = publish(store)
    move_alias(store, read_alias(store, "champion"), champion)
    with Lease(store, f"work/{'a' * 32}/lease.json") as unfinished:
        WorkArea(store, "a" * 32, unfinished).save({"step": b"1"})
    first = sweep.plan(store, KINDS, NOTHING_IS_NEW)
    assert first.items == ()
    now, zombie = time.time(), Lease(store, f"work/{champion.key}/lease.json")
    with zombie:
        zombie_etag = zombie._etag
    monkeypatch.setattr("k2.store.gc.time.time", lambda: now + 29 * DAY_S)
    assert sweep.plan(store, KINDS, NOTHING_IS_NEW).items == ()
    monkeypatch.setattr("k2.store.gc.time.time", lambda: now + 30 * DAY_S + 60)
    made = sweep.plan(store, KINDS, NOTHING_IS_NEW)
    done = [item.name for item in made.items if item.what == "lease"]
    assert done == [f"work/{champion.key}/lease.json"]
    assert [info.name for info in store.list(sweep.PLANS)] == [f"{sweep.PLANS}{made.digest}.json"]
    swept = sweep.apply(store, KINDS, made.digest, settle_s=0)
    assert done[0] in [item.name for item in swept.removed]
    assert store.get(done[0]) is None
    # Who held it long ago and wakes up does not get it back.
    zombie._etag = zombie_etag
    with pytest.raises(StageError):
        zombie.assert_held()
    with Lease(store, done[0]) as again:
        assert (again.held, again.token) == (True, 1)


def test_doing_it_again_changes_nothing(store: Store) -> None:
    publish(store)
    made = sweep.plan(store, KINDS, NOTHING_IS_NEW)
    sweep.apply(store, KINDS, made.digest, settle_s=0)
    before = sorted(info.name for info in store.list("pretrain/"))
    again = sweep.apply(store, KINDS, made.digest[:12], settle_s=0)
    assert (again.removed, len(again.skipped)) == ((), 1)
    assert sorted(info.name for info in store.list("pretrain/")) == before == []
    assert sweep.plan(store, KINDS, NOTHING_IS_NEW).items == ()


def test_new_artifacts_recent_runs_readers_and_running_stages_keep_theirs(store: Store) -> None:
    of_run, read, input_, unneeded = (publish(store) for _ in range(4))
    assert len(sweep.plan(store, KINDS, Policy(grace_hours=1)).kept) == 4
    write_stage_record(store, "r", {"stage": "pretrain", "status": "done", "artifact": of_run.uri})
    key = uuid.uuid4().hex
    with reading(store, read.uri), Lease(store, f"work/{key}/lease.json", reads=[input_.uri]):
        made = sweep.plan(store, KINDS, NOTHING_IS_NEW)
        whys = {each.name: each.why for each in made.kept}
        assert whys[of_run.uri] == "run r"
        assert whys[read.uri] == whys[input_.uri]
        assert str(os.getpid()) in whys[read.uri]
        assert [item.name for item in made.items] == [f"{name(unneeded)}/{unneeded.manifest.attempt}"]
    assert not list(store.list("readers/"))
    assert len(sweep.plan(store, KINDS, NOTHING_IS_NEW).items) == 3
    assert len(sweep.plan(store, KINDS, Policy(days=0, grace_hours=0)).items) == 4


def test_what_a_reader_found_in_the_last_moment_comes_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the manifest before that is moved aside, and says so while apply waits."""
    needed, garbage = publish(store), publish(store)
    made = sweep.plan(store, KINDS, NOTHING_IS_NEW)

    def meanwhile(_: float) -> None:
        assert find(store, needed.kind, needed.key) is None
        write_stage_record(store, "r", {"stage": "pretrain", "status": "done", "artifact": needed.uri})

    monkeypatch.setattr("k2.store.sweep.time.sleep", meanwhile)
    swept = sweep.apply(store, KINDS, made.digest)
    assert swept.restored == (f"{name(needed)}/{needed.manifest.attempt}",)
    assert [item.name.rpartition("/")[0] for item in swept.removed] == [name(garbage)]
    again = find(store, needed.kind, needed.key)
    assert again is not None
    assert again.manifest == needed.manifest
    assert again.intact()


def test_what_is_made_anew_meanwhile_stands(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = publish(store)
    made = sweep.plan(store, KINDS, NOTHING_IS_NEW)
    anew: list[Artifact] = []
    monkeypatch.setattr("k2.store.sweep.time.sleep", lambda _: anew.append(publish(store, key=first.key)))
    swept = sweep.apply(store, KINDS, made.digest)
    assert [item.name for item in swept.removed] == [f"{name(first)}/{first.manifest.attempt}"]
    current = find(store, first.kind, first.key)
    assert current is not None
    assert current.manifest == anew[0].manifest != first.manifest
    assert current.intact()


def test_an_artifact_leased_since_the_plan_is_left_alone(store: Store) -> None:
    made_of = publish(store)
    made = sweep.plan(store, KINDS, NOTHING_IS_NEW)
    with Lease(store, f"work/{made_of.key}/lease.json"):
        swept = sweep.apply(store, KINDS, made.digest, settle_s=0)
    assert swept.removed == ()
    assert open_uri(store, made_of.uri).intact()


def test_only_what_the_plan_lists_goes(store: Store) -> None:
    publish(store)
    made = sweep.plan(store, KINDS, NOTHING_IS_NEW)
    later = publish(store)
    assert len(sweep.apply(store, KINDS, made.digest, settle_s=0).removed) == 1
    assert published(store) == {name(later)}


def test_unfinished_attempts_and_abandoned_work_go_unless_they_are_leased(store: Store) -> None:
    dead, live = uuid.uuid4().hex, uuid.uuid4().hex
    for key in (dead, live):
        store.put(f"pretrain/{key}/0123456789ab/model/weights", b"12345")
        with Lease(store, f"work/{key}/lease.json") as lease:
            WorkArea(store, key, lease).save({"step": b"123"})
    assert [item.what for item in sweep.plan(store, KINDS, NOTHING_IS_NEW).items] == ["attempt", "attempt"]
    with Lease(store, f"work/{live}/lease.json"):
        swept = collect(store, Policy(days=0, grace_hours=0))
    assert sorted((item.what, item.name) for item in swept.removed) == [
        ("attempt", f"pretrain/{dead}/0123456789ab"),
        ("work", f"work/{dead}"),
    ]
    with Lease(store, f"work/{live}/lease.json") as lease:
        assert WorkArea(store, live, lease).load("step") == b"123"


def test_what_k2_did_not_write_is_not_touched(store: Store) -> None:
    theirs = {
        "raw/books/0.txt",
        f"raw/{'0' * 64}/x/1",
        "manifest.json",
        f"pretrain/{'0' * 64}/notes.txt",
        "pretrain/a/b/c",
    }
    for each in theirs:
        store.put(each, b"x")
    with Lease(store, "work/by-hand/lease.json") as lease:
        WorkArea(store, "by-hand", lease).save({"step": b"1"})
    made = sweep.plan(store, KINDS, Policy(days=0, grace_hours=0))
    assert made.items == ()
    assert made.stays["foreign_objects"] == len(theirs)


def test_two_at_once_and_a_plan_that_is_not_there(store: Store) -> None:
    made = sweep.plan(store, KINDS, NOTHING_IS_NEW)
    with Lease(store, sweep.LEASE), pytest.raises(StageError, match=f":{os.getpid()} is collecting garbage"):
        sweep.apply(store, KINDS, made.digest, settle_s=0)
    for digest in ("0" * 64, ""):
        with pytest.raises(UserError, match="k2 gc plan"):
            sweep.apply(store, KINDS, digest, settle_s=0)


def test_nothing_goes_where_a_newer_k2_has_published(store: Store) -> None:
    store.put(f"pretrain/{'1' * 64}/manifest.json", json.dumps({"schema_version": 99}).encode())
    with pytest.raises(StageError, match="schema 99 is of a newer K2"):
        sweep.plan(store, KINDS, NOTHING_IS_NEW)


KILLED = """
import os, signal, sys
from k2.store import sweep
from k2.store.client import Store
left = int(sys.argv[2])
def counted(method):
    def call(self, *arguments, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *arguments, **options)
    return call
Store.put, Store.delete = counted(Store.put), counted(Store.delete)
sweep.apply(Store.from_environment(), ("corpus", "pretrain"), sys.argv[1], settle_s=0)
"""


@pytest.mark.parametrize("writes", [1, 3, 5, 6, 9])
def test_killed_anywhere_the_store_is_valid_and_the_next_apply_finishes(store: Store, writes: int) -> None:
    corpus = publish(store, kind="corpus")
    champion, garbage = publish(store, corpus), publish(store, publish(store, kind="corpus"))
    move_alias(store, read_alias(store, "champion"), champion)
    made = sweep.plan(store, KINDS, NOTHING_IS_NEW)
    assert len(made.items) == 2
    run = subprocess.run([sys.executable, "-c", KILLED, made.digest, str(writes)], check=False)
    assert run.returncode == -9
    for each in take_inventory(store, KINDS, NOTHING_IS_NEW).artifacts:
        assert each.condemned or Artifact(store, each.manifest).intact()
    collect(store)
    assert published(store) == {name(corpus), name(champion)}
    assert not list(store.list(f"pretrain/{garbage.key}/"))
    assert not list(store.list("gc/condemned/"))


graphs = st.dictionaries(st.integers(0, 20), st.lists(st.integers(0, 25), max_size=4), max_size=20)


@given(graphs, st.lists(st.integers(0, 25), max_size=5))
def test_reachability_is_that_of_graphs(edges: dict[int, list[int]], roots: list[int]) -> None:
    graph = networkx.DiGraph([(f"{start}", f"{end}") for start, ends in edges.items() for end in ends])
    graph.add_nodes_from(str(node) for node in edges)
    known = {str(node) for node in edges}
    graph.remove_nodes_from([node for node in graph if node not in known])
    wanted = {str(root) for root in roots} & known
    expected = wanted.union(*(networkx.descendants(graph, root) for root in wanted))
    assert (
        reachable({str(node): [str(end) for end in ends] for node, ends in edges.items()}, map(str, roots)) == expected
    )


@st.composite
def inventories(draw: st.DrawFn) -> tuple[Inventory, dict[str, Any]]:
    """A store of up to a dozen artifacts, of which each may be made of earlier ones."""
    found, count = Inventory(), draw(st.integers(1, 12))
    for number in range(count):
        key, earlier = f"{number:032x}", draw(st.sets(st.integers(0, max(0, number - 1)), max_size=3)) if number else ()
        manifest = Manifest(
            kind="pretrain",
            key=key,
            attempt="a",
            files=(),
            provenance={"inputs": {str(each): uri(each) for each in earlier}},
        )
        age = draw(st.sampled_from([1.0, 100.0])) * HOUR_S
        found.artifacts.append(Published(manifest, NOW - age, condemned=draw(st.booleans())))
        found.folders[f"pretrain/{key}/a"] = [ObjectInfo(f"pretrain/{key}/a/x", 1, "e", NOW - age)]
    some = st.integers(0, count - 1)
    found.aliases = {f"alias{each}": uri(each) for each in draw(st.sets(some, max_size=2))}
    found.runs = {f"run{each}": {uri(each)} for each in draw(st.sets(some, max_size=2))}
    for each in draw(st.sets(some, max_size=2)):
        expires = draw(st.sampled_from([0.0, 9e9]))
        found.leases[f"readers/{each}.json"] = Holder(1, "o", "elsewhere", 1, expires, [uri(each)])
        found.leases[f"work/{each:032x}/lease.json"] = Holder(1, "o", "elsewhere", 1, expires)
        found.touched[f"work/{each:032x}/lease.json"] = NOW - draw(st.sampled_from([1.0, 31.0])) * DAY_S
    return found, {uri(number): each for number, each in enumerate(found.artifacts)}


def uri(number: int) -> str:
    return url(f"pretrain/{number:032x}")


def url(path: str) -> str:
    return f"s3://b/p/{path}"


@settings(max_examples=150, deadline=None)
@given(inventories())
def test_no_plan_removes_what_a_root_needs_and_none_keeps_what_no_root_needs(
    drawn: tuple[Inventory, dict[str, Any]],
) -> None:
    found, by_uri = drawn
    made = make_plan(found, Policy(grace_hours=24), url, NOW)
    going = {url(item.name.rpartition("/")[0]) for item in made.items if item.what == "artifact"}
    roots = {*found.aliases.values(), *(each for uris in found.runs.values() for each in uris)}
    for lease, holder in found.leases.items():
        if holder.expires > time.time():
            roots |= {*holder.reads, *([url(f"pretrain/{lease.split('/')[1]}")] if lease.startswith("work") else [])}
    roots |= {each for each, artifact in by_uri.items() if NOW - artifact.published < 24 * HOUR_S}
    needed: set[str] = set()
    while roots - needed:
        needed |= roots
        roots = {each for name_ in needed for each in by_uri[name_].inputs}
    assert going == set(by_uri) - needed
    assert {each.name for each in made.kept} <= needed
    assert made.stays["artifacts"] == len(needed)
    old = {lease for lease, changed in found.touched.items() if changed < NOW - 30 * DAY_S}
    ended = {lease for lease in old if not found.leases[lease].alive()}
    assert {item.name for item in made.items if item.what == "lease"} == ended
    assert made == make_plan(found, Policy(grace_hours=24), url, NOW)


def test_on_the_command_line(store: Store) -> None:
    garbage, champion = publish(store), publish(store)
    move_alias(store, read_alias(store, "champion"), champion)
    runner = CliRunner()
    options = ["gc", "plan", "--grace-hours", "0"]
    shown = runner.invoke(main, options, catch_exceptions=False).output
    assert f"keep    {champion.uri}: alias champion" in shown
    assert f"remove  artifact {name(garbage)}/{garbage.manifest.attempt}: 32 B" in shown
    made = json.loads(runner.invoke(main, [*options, "--json"]).stdout)
    assert f"k2 gc apply {made['plan'][:12]}" in shown
    done = runner.invoke(main, ["gc", "apply", made["plan"][:12], "--settle-s", "0", "--json"])
    assert json.loads(done.stdout)["bytes"] == 32
    assert published(store) == {name(champion)}
    refused = runner.invoke(main, ["gc", "apply", "0123456789ab"])
    assert refused.exit_code == 2
