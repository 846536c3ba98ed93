"""Requests that come at any time share one batch: a thread that owns the engine, and an asynchronous way to ask it."""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from queue import SimpleQueue

from k2.model.generate import Engine, Sample, Session
from k2.model.sampling import SamplingConfig

log = logging.getLogger(__name__)

Order = Callable[[Session], None]


class Busy(Exception):
    """As many requests are open as are allowed to be."""


@dataclass(frozen=True)
class Token:
    """One token of one sample.

    logprob: natural logarithm of its probability at temperature 1.
    finish_reason: "stop" or "length" on the last token of the sample.
    """

    sample: int
    token: int
    logprob: float
    finish_reason: str | None


@dataclass
class _Request:
    tell: Callable[[Token | Exception], object]
    samples: list[Sample] = field(default_factory=list)


class Batcher:
    """Runs one generation session for all requests, in a thread of its own.

    Attributes:
        failure: what ended the session, after which nothing is answered any more.
    """

    def __init__(self, engine: Engine, rows: int, length: int, most_open: int) -> None:
        """At most `rows` samples at a time, of `length` tokens each with their prompts; `most_open` requests."""
        self.failure: Exception | None = None
        self._fresh: list[tuple[int, int, int]] = []
        self._session = Session(engine, rows, length, lambda *token: self._fresh.append(token))
        self._requests: dict[int, _Request] = {}
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._numbers, self._most = count(), most_open
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, whatever is under way."""
        self._orders.put(None)
        self._thread.join()

    async def generate(self, prompt: Sequence[int], n: int, config: SamplingConfig) -> AsyncGenerator[Token, int]:
        """Tokens of `n` samples as they come; to be closed early by whoever has heard enough.

        The prompt was checked by `Engine.check`.

        Raises:
            Busy: too many requests are open.
            Exception: what ended the session.
        """
        if len(self._requests) >= self._most:
            raise Busy
        loop, events, number = asyncio.get_running_loop(), asyncio.Queue[Token | Exception](), next(self._numbers)
        request = _Request(lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        self._requests[number] = request
        self._orders.put(lambda session: request.samples.extend(session.submit(number, prompt, n, config)))
        open_samples = set(range(n))
        try:
            while open_samples:
                event = self.failure or await events.get()
                if isinstance(event, Exception):
                    raise event
                if event.finish_reason is not None:
                    open_samples.discard(event.sample)
                yield event
        finally:
            del self._requests[number]
            for sample in open_samples:
                self._orders.put(partial(Session.abandon, number=number, sample=sample))

    def _work(self) -> None:
        try:
            while self._obey():
                self._advance()
        except Exception as error:  # whatever it was, nobody must wait for ever
            log.exception("generation ended")
            self.failure = error
            for request in list(self._requests.values()):
                request.tell(error)

    def _obey(self) -> bool:
        """Carry out the orders, waiting for one when there is nothing to generate; False when told to stop."""
        while not (self._session.busy and self._orders.empty()):
            order = self._orders.get()
            if order is None:
                return False
            order(self._session)
        return True

    def _advance(self) -> None:
        self._fresh.clear()
        ended = set(self._session.advance())
        for number, sample, token in self._fresh:
            request = self._requests.get(number)
            if request is not None:
                made = request.samples[sample]
                reason = made.finish_reason if (number, sample) in ended else None
                request.tell(Token(sample, token, made.policy_logprobs[-1], reason))
