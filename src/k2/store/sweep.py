"""Garbage collection, the acting half: store a plan, and remove what it lists as far as that is still garbage.

An artifact goes in two steps. First its manifest is moved aside, so that nobody finds it any more; then, after a time
in which whoever had just found it says so in a run's record or a lease, its files go, or the manifest comes back.
Killed at any point, it leaves a valid store: what was moved aside is taken up by the next plan.
"""

import json
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

from k2.errors import UserError
from k2.store.artifacts import find
from k2.store.client import ConflictError, Store
from k2.store.gc import CONDEMNED, DAY_S, Inventory, Item, Plan, Policy, Published, make_plan, read_plan, take_inventory
from k2.store.lease import Lease, exclusive

LEASE = "gc/lease.json"
PLANS = "gc/plans/"

PLAN_S = 7 * DAY_S
"""A plan that was not applied within this time is forgotten."""

SETTLE_S = 60.0
"""Longer than a reader takes from finding a manifest to saying in the store that it needs the artifact."""

Report = Callable[[int, int], None]
"""Called with how many of how many objects are gone."""


@dataclass(frozen=True)
class Swept:
    """What an apply did."""

    removed: tuple[Item, ...]
    restored: tuple[str, ...]
    skipped: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Bytes that are free now."""
        return sum(item.bytes for item in self.removed)


def plan(
    store: Store, kinds: Collection[str], policy: Policy, progress: Callable[[int], None] = lambda _: None
) -> Plan:
    """Decide what would go, and store that under its digest for `apply`; plans of long ago are forgotten."""
    made = make_plan(take_inventory(store, kinds, policy, progress), policy, store.url)
    _delete(store, [info.name for info in store.list(PLANS) if time.time() - info.modified > PLAN_S])
    store.put(f"{PLANS}{made.digest}.json", made.body())
    return made


def apply(
    store: Store, kinds: Collection[str], digest: str, *, settle_s: float = SETTLE_S, report: Report = lambda *_: None
) -> Swept:
    """Remove what a plan lists and what is still garbage now. May be repeated, also after it was killed.

    Raises:
        UserError: there is no such plan.
        StageError: someone else is collecting garbage right now.
    """
    policy, listed = _stored_plan(store, digest)
    with exclusive(store, LEASE, "collecting garbage") as lease:
        found = take_inventory(store, kinds, policy)
        chosen = [item for item in make_plan(found, policy, store.url).items if (item.what, item.name) in listed]
        artifacts = {item.name for item in chosen if item.what == "artifact"}
        _condemn(store, [each for each in found.artifacts if each.place in artifacts and not each.condemned])
        # Nobody is about to read an attempt that no manifest names, or abandoned work.
        time.sleep(settle_s if artifacts else 0.0)
        found = take_inventory(store, kinds, policy)
        garbage = {(item.what, item.name) for item in make_plan(found, policy, store.url).items}
        restored = _restore(store, found, garbage)
        # Whose manifest is still there was leased a moment ago.
        condemned = {each.place for each in found.artifacts if each.condemned}
        still = [item for item in chosen if (item.what, item.name) in garbage]
        doomed = [item for item in still if item.what != "artifact" or item.name in condemned]
        removed = _remove(store, found, doomed, lease, report)
    gone = {(item.what, item.name) for item in removed}
    return Swept(tuple(removed), restored, tuple(sorted(name for what, name in listed if (what, name) not in gone)))


def _stored_plan(store: Store, digest: str) -> tuple[Policy, frozenset[tuple[str, str]]]:
    names = [info.name for info in store.list(f"{PLANS}{digest}")] if len(digest) >= 8 else []
    data = store.get(names[0]) if len(names) == 1 else None
    if data is None:
        raise UserError(f"plan {digest!r}: there is none; `k2 gc plan` makes one and prints its name")
    return read_plan(data)


def _condemn(store: Store, artifacts: Sequence[Published]) -> None:
    """Move manifests aside, the copy first, so that none is ever lost. Only the holder of its lease replaces one."""
    for each in artifacts:
        with Lease(store, f"work/{each.manifest.key}/lease.json", waiting=lambda _: True) as lease:
            current = find(store, each.manifest.kind, each.manifest.key)
            if lease.held and current is not None and current.manifest == each.manifest:
                record = {"manifest": each.manifest.model_dump(mode="json"), "published": each.published}
                store.put(f"{CONDEMNED}{each.place}.json", json.dumps(record, sort_keys=True).encode())
                store.delete(f"{each.name}/manifest.json")


def _restore(store: Store, found: Inventory, garbage: Collection[tuple[str, str]]) -> tuple[str, ...]:
    """Bring back what a root needs after all, unless it was made anew meanwhile."""
    needed = [each for each in found.artifacts if each.condemned and ("artifact", each.place) not in garbage]
    for each in needed:
        # Made anew: the new attempt stands, and the next plan finds this one's files, which no manifest names.
        with suppress(ConflictError):
            store.put(
                f"{each.name}/manifest.json", each.manifest.model_dump_json(indent=1).encode(), if_none_match=True
            )
        store.delete(f"{CONDEMNED}{each.place}.json")
    return tuple(sorted(each.place for each in needed))


def _remove(store: Store, found: Inventory, items: Sequence[Item], lease: Lease, report: Report) -> list[Item]:
    total, done, removed = sum(item.objects for item in items), 0, []
    for item in items:
        lease.assert_held()
        if _remove_one(store, found, item):
            removed.append(item)
        done += item.objects
        report(done, total)
    return removed


def _remove_one(store: Store, found: Inventory, item: Item) -> bool:
    """Files before the record that they are condemned, the index before the work it names."""
    objects = [info.name for info in found.folders.get(item.name, [])]
    if item.what == "reader":
        store.delete(item.name)
    elif item.what == "artifact":
        _delete(store, [*objects, f"{CONDEMNED}{item.name}.json"])
    else:
        key = item.name.split("/")[1]
        with Lease(store, f"work/{key}/lease.json", waiting=lambda _: True) as lease:
            if not lease.held:
                return False
            _delete(store, sorted(objects, key=lambda name: not name.endswith("/index.json")))
            if item.what == "lease":
                lease.remove()
    return True


def _delete(store: Store, names: Sequence[str]) -> None:
    for name in names:
        store.delete(name)
