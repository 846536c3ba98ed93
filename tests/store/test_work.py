"""Work in progress: atomic commits, fencing, and taking over from the dead."""

import json
import os
import subprocess
import sys
import time

import pytest

from k2.store.client import Store
from k2.store.lease import Holder, Lease, LeaseLostError
from k2.store.work import WorkArea


def test_objects_appear_and_disappear_together(store: Store) -> None:
    with Lease(store, "work/k/lease.json") as lease:
        work = WorkArea(store, "k", lease)
        work.save({"a": b"1", "b": b"2"})
        work.save({"c": b"3"}, drop=["a"])
        again = WorkArea(store, "k", lease)
    assert again.names() == ["b", "c"]
    assert again.load("a") is None
    assert again.load("c") == b"3"


def test_a_fenced_holder_changes_nothing(store: Store) -> None:
    with Lease(store, "work/k/lease.json") as lease:
        old = WorkArea(store, "k", lease)
        old.save({"a": b"old"})
        new = WorkArea(store, "k", lease)
        new.save({"a": b"new"})
        with pytest.raises(LeaseLostError):
            old.save({"a": b"zombie"})
    assert WorkArea(store, "k", lease).load("a") == b"new"


def test_clear_leaves_nothing_but_the_lease(store: Store) -> None:
    with Lease(store, "work/k/lease.json") as lease:
        work = WorkArea(store, "k", lease)
        work.save({"a": b"1"})
        work.clear()
        assert [info.name for info in store.list("work/k/")] == ["work/k/lease.json"]
        work.save({"b": b"2"})
    assert WorkArea(store, "k", lease).names() == ["b"]


def test_tokens_grow(store: Store) -> None:
    tokens = []
    for _ in range(3):
        with Lease(store, "work/k/lease.json") as lease:
            tokens.append(lease.token)
    assert tokens == [1, 2, 3]


def test_one_holder_at_a_time(store: Store) -> None:
    seen: list[Holder] = []
    with Lease(store, "work/k/lease.json"):
        waiter = Lease(store, "work/k/lease.json", waiting=lambda holder: not seen.append(holder))
        with waiter as second:
            assert not second.held
    assert seen[0].pid == os.getpid()


def test_a_killed_holder_on_this_host_is_replaced_at_once(store: Store) -> None:
    code = (
        "import os, signal, sys\n"
        "from k2.store.client import Store\nfrom k2.store.lease import Lease\n"
        "with Lease(Store.from_environment(), 'work/k/lease.json'):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert store.get("work/k/lease.json") is not None
    started = time.monotonic()
    with Lease(store, "work/k/lease.json") as lease:
        assert lease.token == 2
    assert time.monotonic() - started < 5


def test_a_holder_elsewhere_is_waited_for_until_it_expires(store: Store) -> None:
    holder = {"token": 4, "owner": "x", "host": "elsewhere", "pid": 1, "expires": time.time() + 2}
    store.put("work/k/lease.json", json.dumps(holder).encode())
    started = time.monotonic()
    with Lease(store, "work/k/lease.json") as lease:
        assert lease.token == 5
    assert time.monotonic() - started > 1
