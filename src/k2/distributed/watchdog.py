"""Ranks that hang, die slowly or are told to end: seen, named, and ended so that torchrun can start them again.

Every rank notes what it does. A thread tells the others through torchrun's store; when its own rank has not got on for
too long it asks who is to blame, says so with what torch's flight recorder has, and ends the process.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Self

from torch import Tensor
from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]

from k2.distributed.meeting import connect

HUNG = 75
"""Exit code of a rank that gave up: temporary failure, another attempt may succeed."""
LOOKS = 4
"""Signs of life of a rank that are waited for before it is called dead."""
RECENT = 12
"""Collectives that the dump shows of the rank that writes it."""
SHAPES = 3
"""Tensors of a collective whose shapes are shown."""


@dataclass
class Activity:
    """What this process does: the collective it waits in, or computing after one.

    step: the last one finished. number: of the collective that all ranks make in the same order; those within another,
    and of tokens to experts, have that of the last. tensors: what it exchanges. since: when it last went on (monotonic
    seconds). working_s, waited_s: time spent computing and in collectives. told_to_end: SIGTERM came.
    """

    step: int = 0
    number: int = 0
    collective: str | None = None
    tensors: str = ""
    inside: bool = False
    last: str = "start"
    since: float = field(default_factory=time.monotonic)
    working_s: float = 0.0
    waited_s: float = 0.0
    told_to_end: bool = False
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=RECENT))

    def as_json(self) -> str:
        """For the other ranks; `idle_s` is by this rank's clock."""
        idle = round(time.monotonic() - self.since, 3)
        place = {"step": self.step, "number": self.number, "in": self.collective, "tensors": self.tensors}
        return json.dumps({**place, "after": self.last, "idle_s": idle})


HERE = Activity()
"""One process is one rank."""


@contextmanager
def collective(name: str, tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """Wait for other ranks, under a name that a dump can show, with the shapes of what is exchanged."""
    outer, inside, started = (HERE.collective, HERE.tensors), HERE.inside, time.monotonic()
    HERE.number += not inside
    HERE.collective, HERE.tensors, HERE.inside, HERE.since = name, _shapes(tensors), True, started
    try:
        yield
    finally:
        HERE.since = time.monotonic()
        HERE.waited_s += HERE.since - started
        took = f"{1e3 * (HERE.since - started):.1f} ms"
        HERE.recent.append(f"step {HERE.step}, number {HERE.number}: {name}{HERE.tensors}, {took}")
        (HERE.collective, HERE.tensors), HERE.inside, HERE.last = outer, inside, name


def _shapes(tensors: Iterable[Tensor]) -> str:
    """Such as ` of float32[4, 8], int64[2]`; of many tensors the first."""
    found = [f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in tensors]
    more = f" and {len(found) - SHAPES} more" if len(found) > SHAPES else ""
    return f" of {', '.join(found[:SHAPES])}{more}" if found else ""


@contextmanager
def working() -> Iterator[None]:
    """Compute; collectives within do not count."""
    outer, inside, started, waited = HERE.collective, HERE.inside, time.monotonic(), HERE.waited_s
    HERE.collective, HERE.inside, HERE.since = None, True, started
    try:
        yield
    finally:
        HERE.collective, HERE.inside, HERE.since = outer, inside, time.monotonic()
        HERE.working_s += HERE.since - started - (HERE.waited_s - waited)


States = Mapping[int, tuple[int, Mapping[str, Any]]]
"""Number of a rank's last sign of life, and what the rank did then."""


class Watchdog:
    """Watches this process from entering to leaving; SIGTERM in between asks the run to save and end."""

    def __init__(self, rank: int, ranks: int, timeout_s: float) -> None:
        self._store = connect()
        self._rank, self._ranks, self._timeout_s = rank, ranks, timeout_s
        self._interval_s = min(10.0, timeout_s / 8)
        self._stop, self._beat = threading.Event(), 0

    def __enter__(self) -> Self:
        HERE.told_to_end = False
        HERE.since = time.monotonic()
        self._previous = signal.signal(signal.SIGTERM, _told)
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        signal.signal(signal.SIGTERM, self._previous)

    def _watch(self) -> None:
        looks: list[States] = []
        while not self._stop.wait(self._interval_s):
            try:
                self._give_sign()
                if time.monotonic() - HERE.since <= self._timeout_s:
                    looks.clear()
                    continue
                looks.append(self._states())
                if len(looks) == LOOKS and self._speaks():
                    _say("\n".join(verdict(looks[0], looks[-1], self._ranks)))
                if len(looks) > 2 * LOOKS:
                    self._give_up()
            except RuntimeError as error:  # torch's for every trouble with its store: the agent is gone
                _say(f"rank {self._rank} lost the store of its agent and ends: {error}")
                os._exit(HUNG)

    def _give_sign(self) -> None:
        self._beat += 1
        self._store.set(f"alive/{self._rank}", json.dumps([self._beat, HERE.as_json()]))

    def _speaks(self) -> bool:
        """Whether this rank is the one that says what was found."""
        me = str(self._rank)
        return bytes(self._store.compare_set("hung", "", me)) == me.encode()

    def _give_up(self) -> None:
        """Show where this rank is, and end; later than the verdict, for which it must give signs of life."""
        faulthandler.dump_traceback(sys.stderr)
        now = f"in {HERE.collective!r}, number {HERE.number}{HERE.tensors}" if HERE.collective else "in no collective"
        lines = [f"rank {self._rank}, {now}; its last collectives:", *(f"  {line}" for line in HERE.recent)]
        lines.append(f"rank {self._rank}, torch's flight recorder: {_recorded()}")
        _say("\n".join(lines))
        os._exit(HUNG)

    def _states(self) -> States:
        """Of the ranks that gave a sign."""
        names = {rank: f"alive/{rank}" for rank in range(self._ranks)}
        found = {rank: json.loads(self._store.get(n)) for rank, n in names.items() if self._store.check([n])}
        return {rank: (beat, json.loads(text)) for rank, (beat, text) in found.items()}


def _told(_: int, __: FrameType | None) -> None:
    HERE.told_to_end = True


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def verdict(before: States, after: States, ranks: int) -> list[str]:
    """Who keeps the others waiting, and what every rank does: lines for people, the first names the culprits.

    In this order: ranks without a sign of life between both looks, ranks that are in no collective, ranks that are
    in an earlier step or an earlier collective than others; else nobody.
    """
    silent = [rank for rank in range(ranks) if rank not in after or before.get(rank, (-1,))[0] == after[rank][0]]
    outside = [rank for rank, (_, state) in sorted(after.items()) if state["in"] is None]
    reasons = {
        "no sign of life": silent,
        "in no collective": outside,
        "an earlier step": _behind(after, "step"),
        "an earlier collective": _behind(after, "number"),
    }
    reason, guilty = next(((why, found) for why, found in reasons.items() if found), ("nobody stands out", []))
    names = ", ".join(f"rank {rank}" for rank in guilty) or "all ranks wait"
    lines = [f"hung: {names} ({reason})"]
    for rank, (_, state) in sorted(after.items()):
        where = f"waits in {state['in']!r}" if state["in"] else f"after {state['after']!r}"
        what = f"number {state['number']}{state['tensors']}"
        lines.append(f"  rank {rank}: step {state['step']}, {where}, {what}, for {state['idle_s']:.1f} s")
    return lines + [f"  rank {rank}: never gave a sign" for rank in silent if rank not in after]


def _recorded() -> str:
    """What is under way in any process group, by torch's flight recorder; it has no public way to be asked."""
    entries = json.loads(_dump_fr_trace_json()).get("entries", ())
    under_way = (
        f"{each['profiling_name']} of {each['input_sizes']}, number {each['collective_seq_id']} of group"
        f" {' '.join(each['process_group'])}"
        for each in entries
        if not each["retired"]
    )
    return "; ".join(under_way) or "nothing under way"


def _behind(states: States, what: str) -> list[int]:
    newest = max((state[what] for _, state in states.values()), default=0)
    return [rank for rank, (_, state) in sorted(states.items()) if state[what] < newest]
