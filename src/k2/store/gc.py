"""Garbage collection, the deciding half: what is in the store, what must stay and why, what would go.

Roots are aliases, recent runs, live leases with what they read, and whatever was published lately; everything that a
root was made from stays too. What K2 did not write is never touched. `sweep.py` does what a plan says.
"""

import hashlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from k2.store.artifacts import Manifest, read_manifest
from k2.store.client import ObjectInfo, Store
from k2.store.lease import Holder, parse_holder

CONDEMNED = "gc/condemned/"
"""Manifests that were taken away from readers, and whose files go unless a root still needs them."""

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S

_OWN = re.compile(r"(?P<kind>[a-z]+)/(?P<key>[0-9a-f]{32,64})/(?P<rest>.+)")
_WORK = re.compile(r"work/(?P<key>[0-9a-f]{32,64})/(?P<rest>.+)")


@dataclass(frozen=True)
class Policy:
    """How long things stay that no alias and no lease needs."""

    days: float = 30.0
    """Days for which a run keeps its artifacts, and unfinished work that nobody continues stays."""
    grace_hours: float = 24.0
    """Hours for which anything new stays, whoever may or may not need it."""


@dataclass
class Published:
    """An artifact: a manifest and the files of its attempt. `condemned`: only garbage collection still finds it."""

    manifest: Manifest
    published: float
    condemned: bool = False

    @property
    def name(self) -> str:
        """`kind/key`."""
        return f"{self.manifest.kind}/{self.manifest.key}"

    @property
    def place(self) -> str:
        """`kind/key/attempt`: what exactly goes, whatever is published under the key later."""
        return f"{self.name}/{self.manifest.attempt}"

    @property
    def inputs(self) -> list[str]:
        """URIs of what it was made from."""
        return sorted(self.manifest.provenance.get("inputs", {}).values())


@dataclass
class Inventory:
    """What is in a store, read once. Groups of objects are by their folder."""

    artifacts: list[Published] = field(default_factory=list)
    folders: dict[str, list[ObjectInfo]] = field(default_factory=dict)
    """`kind/key/attempt` and `work/key` -> objects, the lease of the work area left out."""
    aliases: dict[str, str] = field(default_factory=dict)
    runs: dict[str, set[str]] = field(default_factory=dict)
    """Recent run -> URIs."""
    leases: dict[str, Holder] = field(default_factory=dict)
    touched: dict[str, float] = field(default_factory=dict)
    """Name of a lease -> when it changed last (Unix seconds)."""
    foreign: list[ObjectInfo] = field(default_factory=list)

    def held(self) -> dict[str, Holder]:
        """Key of the work (or name of the lease, when it is on no work) -> who holds it now."""
        keys = {name: _WORK.fullmatch(name) for name in self.leases}
        alive = {name: holder for name, holder in self.leases.items() if holder.alive()}
        return {match["key"] if (match := keys[name]) else name: holder for name, holder in alive.items()}


@dataclass(frozen=True)
class Item:
    """One thing to remove: all objects under `name`, and for an artifact its manifest."""

    what: Literal["artifact", "attempt", "work", "reader", "lease"]
    name: str
    objects: int
    bytes: int
    why: str = field(compare=False)


@dataclass(frozen=True)
class Kept:
    """A root, and why it is one."""

    name: str
    why: str


@dataclass(frozen=True)
class Plan:
    """What would go and what stays. Its digest names exactly what `apply` may remove."""

    policy: Policy
    items: tuple[Item, ...]
    kept: tuple[Kept, ...]
    stays: dict[str, int]

    @property
    def digest(self) -> str:
        """SHA-256 of the policy and the items."""
        return hashlib.sha256(self.body()).hexdigest()

    def body(self) -> bytes:
        """What is stored of a plan."""
        rows = [{name: getattr(item, name) for name in ("what", "name", "objects", "bytes")} for item in self.items]
        return json.dumps({"policy": asdict(self.policy), "items": rows}, sort_keys=True).encode()


def take_inventory(
    store: Store, kinds: Collection[str], policy: Policy, progress: Callable[[int], None] = lambda _: None
) -> Inventory:
    """List the whole prefix once and read the small objects in it. `kinds` are the kinds of artifacts K2 makes.

    `progress` is called with the number of objects seen so far.

    Raises:
        StageError: a newer K2 published something here, so that this one cannot tell what it needs.
    """
    found, folders, records = Inventory(), defaultdict(list), defaultdict(list)
    for count, info in enumerate(store.list(""), start=1):
        progress(count)
        own, work = _OWN.fullmatch(info.name), _WORK.fullmatch(info.name)
        if own and own["kind"] in kinds and own["rest"] == "manifest.json":
            _add_artifact(store, found, info.name, info.modified)
        elif own and own["kind"] in kinds and "/" in own["rest"]:
            folders[f"{own['kind']}/{own['key']}/{own['rest'].partition('/')[0]}"].append(info)
        elif work and work["rest"] != "lease.json":
            folders[f"work/{work['key']}"].append(info)
        elif info.name.startswith("runs/"):
            records[info.name.split("/")[1]].append(info)
        else:
            _add_root(store, found, info)
    found.folders = dict(folders)
    since = time.time() - policy.days * DAY_S
    recent = {run: infos for run, infos in records.items() if max(info.modified for info in infos) > since}
    found.runs = {run: set(_uris(store, infos)) for run, infos in recent.items()}
    return found


def _add_artifact(store: Store, found: Inventory, name: str, modified: float) -> None:
    data = store.get(name)
    manifest = None if data is None else read_manifest(data, store.url(name))
    if manifest is not None and name == f"{manifest.kind}/{manifest.key}/manifest.json":
        found.artifacts.append(Published(manifest, modified))


def _add_root(store: Store, found: Inventory, info: ObjectInfo) -> None:
    folder, _, rest = info.name.partition("/")
    lease = folder == "readers" or (folder in ("work", "schedules") and rest.endswith("lease.json"))
    if folder not in ("aliases", "gc", "readers", "schedules", "scores", "spending", "work"):
        found.foreign.append(info)
        return
    body = store.get(info.name) if lease or folder == "aliases" or info.name.startswith(CONDEMNED) else None
    if body is None:
        return
    if lease:
        found.leases[info.name], found.touched[info.name] = parse_holder(body), info.modified
    elif folder == "aliases":
        found.aliases[rest.removesuffix(".json")] = json.loads(body)["uri"]
    else:
        record = json.loads(body)
        found.artifacts.append(Published(Manifest(**record["manifest"]), record["published"], condemned=True))


def _uris(store: Store, infos: Iterable[ObjectInfo]) -> Iterator[str]:
    """The artifacts that the stages of a run made or found."""
    for info in infos:
        body = store.get(info.name) if "/stages/" in info.name else None
        uri = json.loads(body)["artifact"] if body else None
        if uri:
            yield uri


def reachable(inputs: Mapping[str, Iterable[str]], roots: Iterable[str]) -> set[str]:
    """The roots and everything they were made from, as far as it is known."""
    seen: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in inputs and name not in seen:
            seen.add(name)
            waiting.extend(inputs[name])
    return seen


def make_plan(found: Inventory, policy: Policy, url: Callable[[str], str], now: float | None = None) -> Plan:
    """Decide; reads and changes nothing. `url` turns `kind/key` into a URI."""
    now = time.time() if now is None else now
    roots = list(_roots(found, policy, url, now))
    inputs: dict[str, set[str]] = defaultdict(set)
    for each in found.artifacts:
        inputs[url(each.name)] |= set(each.inputs)
    stays = reachable(inputs, {root.name for root in roots})
    kept = tuple(sorted({root for root in roots if root.name in inputs}, key=lambda root: (root.name, root.why)))
    items = [*_artifacts(found, stays, url), *_leftovers(found, policy, now), *_readers(found)]
    items += _leases(found, policy, now)
    sizes = {each.place: each.manifest.size for each in found.artifacts if url(each.name) in stays}
    foreign = {"foreign_objects": len(found.foreign), "foreign_bytes": sum(each.size for each in found.foreign)}
    totals = {"artifacts": len(sizes), "bytes": sum(sizes.values()), **foreign}
    return Plan(policy, tuple(sorted(items, key=lambda item: (item.what, item.name))), kept, totals)


def _roots(found: Inventory, policy: Policy, url: Callable[[str], str], now: float) -> Iterator[Kept]:
    for name, uri in found.aliases.items():
        yield Kept(uri, f"alias {name}")
    for run, uris in found.runs.items():
        yield from (Kept(uri, f"run {run}") for uri in uris)
    held = found.held()
    for holder in held.values():
        yield from (Kept(uri, f"read by {holder.host}:{holder.pid}") for uri in holder.reads)
    for each in found.artifacts:
        if each.manifest.key in held:
            yield Kept(url(each.name), f"leased by {held[each.manifest.key].host}:{held[each.manifest.key].pid}")
        if now - each.published < policy.grace_hours * HOUR_S:
            yield Kept(url(each.name), f"published in the last {policy.grace_hours:g} hours")


def _artifacts(found: Inventory, stays: Collection[str], url: Callable[[str], str]) -> Iterator[Item]:
    for each in found.artifacts:
        if url(each.name) not in stays:
            objects = found.folders.get(each.place, [])
            size = sum(info.size for info in objects)
            why = "its removal was interrupted" if each.condemned else "no alias, recent run or lease leads to it"
            yield Item("artifact", each.place, len(objects) + 1, size, why)


def _leftovers(found: Inventory, policy: Policy, now: float) -> Iterator[Item]:
    """Attempts that no manifest names and work that nobody continues, both old and without a live lease."""
    known = {each.place for each in found.artifacts}
    done = {each.manifest.key for each in found.artifacts if not each.condemned}
    held = found.held()
    for folder, objects in found.folders.items():
        key = folder.split("/")[1]
        if folder in known or key in held:
            continue
        work = folder.startswith("work/")
        patience = policy.days * DAY_S if work and key not in done else policy.grace_hours * HOUR_S
        if now - max(info.modified for info in objects) >= patience:
            why = "nobody continues it" if work else "no manifest names it"
            yield Item("work" if work else "attempt", folder, len(objects), sum(info.size for info in objects), why)


def _readers(found: Inventory) -> Iterator[Item]:
    for name, holder in found.leases.items():
        if name.startswith("readers/") and not holder.alive():
            yield Item("reader", name, 1, 0, "its reader is gone")


def _leases(found: Inventory, policy: Policy, now: float) -> Iterator[Item]:
    """Of work that left nothing to continue; for a day at least, in which a process that was stopped may come back."""
    patience = max(policy.days, 1.0) * DAY_S
    for name, holder in found.leases.items():
        work = _WORK.fullmatch(name)
        left = work is not None and f"work/{work['key']}" not in found.folders
        if left and not holder.alive() and now - found.touched[name] >= patience:
            yield Item("lease", name, 1, 0, "nothing is left of its work")


def read_plan(data: bytes) -> tuple[Policy, frozenset[tuple[str, str]]]:
    """The policy of a stored plan, and what it allows to remove: pairs of `what` and name."""
    stored: dict[str, Any] = json.loads(data)
    return Policy(**stored["policy"]), frozenset((row["what"], row["name"]) for row in stored["items"])
