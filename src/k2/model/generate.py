"""Batched generation: RL rollouts, evaluation, chat and the server share this engine.

A prompt is run once for all its samples. A row of the batch is given to the next sample as soon as its own ends,
so that short and long samples keep the batch full. Every sample draws from a random stream of its own.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from k2.errors import UserError
from k2.model.decode import Decoder, Prepared
from k2.model.sampling import RowSampling, SamplingConfig, choose, stream_key, uniforms
from k2.model.transformer import Transformer

OnToken = Callable[[int, int, int], None]  # prompt number, sample number, token
PREFILL_TOKENS = 8192  # prompt tokens run at once, padding included


@dataclass
class Sample:
    """One generated continuation.

    token_ids: generated tokens, the stop token included.
    logprobs: natural-log probability of each under the distribution it was drawn from.
    policy_logprobs: the same at temperature 1 without top-k and top-p.
    finish_reason: "stop" at a stop token or sequence, "length" at max_tokens.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    policy_logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"


@dataclass
class _Row:
    """A sample on its way; it occupies one row of the cache from its first token to its last.

    The first step of a sample runs the last token of its prompt; the cache holds the tokens before that one.
    """

    prompt: int
    number: int
    prompt_ids: Sequence[int]
    config: SamplingConfig
    stops: frozenset[int]
    key: int
    sample: Sample
    token: int
    slot: int

    @property
    def name(self) -> tuple[int, int]:
        """Numbers of the prompt and of the sample."""
        return self.prompt, self.number

    def add(self, token: int, logprob: float, policy_logprob: float) -> bool:
        """Append a token; whether the sample is finished."""
        sample = self.sample
        sample.token_ids.append(token)
        sample.logprobs.append(logprob)
        sample.policy_logprobs.append(policy_logprob)
        self.token, self.slot = token, self.slot + 1
        if token in self.stops or self._ends_with_a_sequence():
            sample.finish_reason = "stop"
            return True
        return len(sample.token_ids) >= self.config.max_tokens

    def _ends_with_a_sequence(self) -> bool:
        tokens = self.sample.token_ids
        return any(tuple(tokens[-len(stop) :]) == stop for stop in self.config.stop_sequences)


class Engine:
    """Generates with a model whose weights may change between calls; call `refresh` after they did."""

    def __init__(self, model: Transformer, *, eos_ids: Sequence[int] = (), max_batch_tokens: int = 2**17) -> None:
        """`max_batch_tokens` bounds the cache: rows in flight times the longest sequence asked for."""
        self.model = model
        self.eos_ids = frozenset(eos_ids)
        self.max_batch_tokens = max_batch_tokens
        self.refresh()

    def refresh(self) -> None:
        """Take over the model's present weights."""
        with torch.inference_mode():
            self.prepared = Prepared(self.model)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingConfig | Sequence[SamplingConfig],
        *,
        on_token: OnToken | None = None,
    ) -> list[list[Sample]]:
        """`n` samples for each prompt, in order. `sampling` is one configuration or one per prompt.

        Raises UserError for an empty prompt, an unknown token, or a prompt that leaves no room for max_tokens.
        """
        configs = [sampling] * len(prompts) if isinstance(sampling, SamplingConfig) else list(sampling)
        self.check(prompts, configs)
        length = max((len(p) + c.max_tokens for p, c in zip(prompts, configs, strict=True)), default=1)
        session = Session(self, min(len(prompts) * n, self.max_batch_tokens // length), length, on_token)
        results = [session.submit(i, p, n, c) for i, (p, c) in enumerate(zip(prompts, configs, strict=True))]
        while session.busy:
            session.advance()
        return results

    def check(self, prompts: Iterable[Sequence[int]], configs: Iterable[SamplingConfig]) -> None:
        """Raise UserError for an empty prompt, an unknown token, or a prompt that leaves no room for max_tokens."""
        config = self.model.config
        limits = {"max_position_embeddings": config.max_position_embeddings, "max_batch_tokens": self.max_batch_tokens}
        name = min(limits, key=lambda limit: limits[limit])
        for number, (prompt, sampling) in enumerate(zip(prompts, configs, strict=True)):
            if not prompt:
                raise UserError(f"prompt {number} is empty, at least one token is needed")
            if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
                raise UserError(f"prompt {number} holds a token outside [0, {config.vocab_size})")
            if len(prompt) + sampling.max_tokens > limits[name]:
                raise UserError(
                    f"prompt {number} has {len(prompt)} tokens and max_tokens is {sampling.max_tokens};"
                    f" together at most {limits[name]} ({name}) fit"
                )


class Session:
    """Samples that come and go over the rows of one cache. Active ones occupy rows 0, 1, ... without gaps."""

    def __init__(self, engine: Engine, rows: int, length: int, on_token: OnToken | None = None) -> None:
        """Room for `rows` samples at a time, each of at most `length` tokens with its prompt."""
        self.eos_ids, self.device, self.on_token = engine.eos_ids, engine.prepared.device, on_token
        self.capacity, self.decoder = rows, Decoder(engine.prepared, rows, length)
        self.waiting: deque[_Row] = deque()
        self.rows: list[_Row] = []
        self._done: list[int] = []
        self._abandoned: set[tuple[int, int]] = set()

    @property
    def busy(self) -> bool:
        """Whether any sample has not ended."""
        return bool(self.waiting) or len(self.rows) > len(self._done)

    def submit(self, number: int, prompt: Sequence[int], n: int, config: SamplingConfig) -> list[Sample]:
        """Let `n` samples of a prompt wait for rows; they fill as `advance` is called. `number` names the prompt."""
        samples = [Sample() for _ in range(n)]
        stops = self.eos_ids | set(config.stop_ids)
        for s, sample in enumerate(samples):
            key = stream_key(config.seed, prompt, s)
            self.waiting.append(_Row(number, s, prompt, config, stops, key, sample, prompt[-1], len(prompt) - 1))
        return samples

    def abandon(self, number: int, sample: int) -> None:
        """Give up one sample of a prompt; the row it holds ends with its next token."""
        given_up = (number, sample)
        self.waiting = deque(row for row in self.waiting if row.name != given_up)
        self._abandoned |= {given_up} & {row.name for row in self.rows}

    @torch.inference_mode()
    def advance(self) -> list[tuple[int, int]]:
        """One more token for every active sample; (prompt, sample) numbers of those that ended with it."""
        if self._done or (self.waiting and len(self.rows) < self.capacity):
            self._replace(self._done)
        self._done = self._step() if self.rows else []
        if self._abandoned:
            self._abandoned -= {self.rows[i].name for i in self._done}
        return [self.rows[i].name for i in self._done]

    def _step(self) -> list[int]:
        """One more token for every row; the rows whose samples ended."""
        rows = self.rows
        logits_BV = self.decoder.step([row.token for row in rows], [row.slot for row in rows])
        keys = np.array([row.key for row in rows], dtype=np.uint64)
        steps = np.array([len(row.sample.token_ids) for row in rows], dtype=np.uint64)
        uniform_B = torch.from_numpy(uniforms(keys, steps)).to(self.device)
        drawn = [values.tolist() for values in choose(logits_BV, self.parameters, uniform_B)]
        return [i for i, (row, *values) in enumerate(zip(rows, *drawn, strict=True)) if self._record(row, *values)]

    def _record(self, row: _Row, token: int, logprob: float, policy_logprob: float) -> bool:
        ended = row.add(token, logprob, policy_logprob)
        if self.on_token is not None:
            self.on_token(row.prompt, row.number, token)
        return ended or row.name in self._abandoned

    def _replace(self, done: list[int]) -> None:
        """Give the rows of finished samples, and rows never used, to waiting samples; close the gaps that remain."""
        free = [*done, *range(len(self.rows), self.capacity)]
        places = free[: len(self.waiting)]
        newcomers = [self.waiting.popleft() for _ in places]
        self._supply(newcomers, places)
        for row, place in zip(newcomers, places, strict=True):
            self.rows[place : place + 1] = [row]
        self._drop(done[len(places) :])
        self.parameters = RowSampling.of([row.config for row in self.rows], self.device)

    def _supply(self, newcomers: list[_Row], places: list[int]) -> None:
        """Bring the newcomers' prompts into their rows: from a row that holds the same prompt, else by running it."""
        pairs = list(zip(newcomers, places, strict=True))
        holders = {row.prompt: place for place, row in enumerate(self.rows)}
        self._copy([(holders[row.prompt], place, row) for row, place in pairs if row.prompt in holders])
        fresh = [(row, place) for row, place in pairs if row.prompt not in holders]
        owners = {row.prompt: (row, place) for row, place in fresh}
        self._prefill(owners.values())
        self._copy([(owners[row.prompt][1], place, row) for row, place in fresh])

    def _copy(self, moves: list[tuple[int, int, _Row]]) -> None:
        """Copy prompts between rows (source, target, newcomer), all at once."""
        moves = [move for move in moves if move[0] != move[1]]
        if moves:
            source, target = (torch.tensor([move[i] for move in moves], device=self.device) for i in (0, 1))
            self.decoder.cache.move(source, target, max(row.slot for _, _, row in moves))

    def _prefill(self, owners: Iterable[tuple[_Row, int]]) -> None:
        """Run the newcomers' prompts without their last tokens in these rows of the cache."""
        pending = deque((place, row.prompt_ids[:-1]) for row, place in owners if row.slot)
        while pending:
            part: list[tuple[int, Sequence[int]]] = []
            longest = 0
            while pending and (not part or max(longest, len(pending[0][1])) * (len(part) + 1) <= PREFILL_TOKENS):
                longest = max(longest, len(pending[0][1]))
                part.append(pending.popleft())
            padded = [[*ids, *[0] * (longest - len(ids))] for _, ids in part]
            places = torch.tensor([place for place, _ in part], device=self.device)
            self.decoder.prefill(torch.tensor(padded, device=self.device), places)

    def _drop(self, done: list[int]) -> None:
        """Fill the rows of finished samples with the last rows, so that active rows stay without gaps."""
        count = len(self.rows) - len(done)
        finished = set(done)
        holes = [i for i in done if i < count]
        movers = [i for i in range(count, len(self.rows)) if i not in finished]
        if holes:
            source, target = (torch.tensor(x, device=self.device) for x in (movers, holes))
            self.decoder.cache.move(source, target, max(self.rows[mover].slot for mover in movers))
            for mover, hole in zip(movers, holes, strict=True):
                self.rows[hole] = self.rows[mover]
        del self.rows[count:]
