"""Batched generation: RL rollouts, evaluation, chat and the server share this engine.

A prompt is run once for all its samples. Rows of the batch are reused as soon as a sample ends, so that short
and long samples keep the batch full. Every sample draws from a random stream of its own.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from k2.errors import UserError
from k2.model.cache import LatentCache
from k2.model.decode import Decoder, prefill, resident
from k2.model.layers import upcast
from k2.model.sampling import RowSampling, SamplingConfig, choose, stream_key, uniforms
from k2.model.transformer import Transformer

OnToken = Callable[[int, int, int], None]  # prompt number, sample number, token
PREFILL_TOKENS = 8192  # prompt tokens run at once


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
    """A sample on its way; it occupies one row of the cache from its first token to its last."""

    prompt: int
    number: int
    config: SamplingConfig
    stops: frozenset[int]
    key: int
    sample: Sample

    def add(self, token: int, logprob: float, policy_logprob: float) -> bool:
        """Append a token; whether the sample is finished."""
        sample = self.sample
        sample.token_ids.append(token)
        sample.logprobs.append(logprob)
        sample.policy_logprobs.append(policy_logprob)
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
        self.source = model
        self.eos_ids = frozenset(eos_ids)
        self.max_batch_tokens = max_batch_tokens
        self.refresh()

    def refresh(self) -> None:
        """Take over the model's present weights."""
        with torch.inference_mode():
            self.model = resident(self.source)

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
        self._check(prompts, configs)
        results = [[Sample() for _ in range(n)] for _ in prompts]
        if prompts and n:
            _Run(self, prompts, configs, results, on_token).finish()
        return results

    def _check(self, prompts: Sequence[Sequence[int]], configs: Sequence[SamplingConfig]) -> None:
        longest, vocabulary = self.model.config.max_position_embeddings, self.model.config.vocab_size
        for number, (prompt, config) in enumerate(zip(prompts, configs, strict=True)):
            if not prompt:
                raise UserError(f"prompt {number} is empty, at least one token is needed")
            if not 0 <= min(prompt) <= max(prompt) < vocabulary:
                raise UserError(f"prompt {number} holds a token outside [0, {vocabulary})")
            if len(prompt) + config.max_tokens > longest:
                raise UserError(
                    f"prompt {number} has {len(prompt)} tokens and max_tokens is {config.max_tokens};"
                    f" together at most {longest} (max_position_embeddings) fit"
                )


class _Run:
    """One call of `generate`. Active samples occupy rows 0, 1, ... of the cache without gaps."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        configs: Sequence[SamplingConfig],
        results: list[list[Sample]],
        on_token: OnToken | None,
    ) -> None:
        self.model, self.prompts, self.on_token = engine.model, prompts, on_token
        self.device = next(engine.model.parameters()).device
        length = max(len(p) + c.max_tokens for p, c in zip(prompts, configs, strict=True))
        total = sum(map(len, results))
        self.capacity = max(len(results[0]), min(total, engine.max_batch_tokens // length))
        self.cache = LatentCache(engine.model.config, self.capacity, length, engine.model.compute_dtype, self.device)
        self.decoder = Decoder(engine.model, length)
        self.waiting = deque(
            [
                _Row(p, s, configs[p], engine.eos_ids | set(configs[p].stop_ids), key, sample)
                for s, sample in enumerate(samples)
                for key in [stream_key(configs[p].seed, prompts[p], s)]
            ]
            for p, samples in enumerate(results)
        )
        self.rows: list[_Row] = []
        self.tokens_B = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.slots_B = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.parameters = RowSampling.of([], self.device)

    def finish(self) -> None:
        """Generate until every sample has ended."""
        while self.rows or self.waiting:
            if self.waiting and len(self.waiting[0]) <= self.capacity - len(self.rows):
                self._admit()
            else:
                self._step()

    def _admit(self) -> None:
        """Run as many waiting prompts as fit, and draw the first token of their samples."""
        groups: list[list[_Row]] = []
        room, tokens = self.capacity - len(self.rows), 0
        while self.waiting and len(self.waiting[0]) <= room and (not groups or tokens < PREFILL_TOKENS):
            groups.append(self.waiting.popleft())
            room -= len(groups[-1])
            tokens += len(self.prompts[groups[-1][0].prompt])
        prompts = [self.prompts[group[0].prompt] for group in groups]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        longest = int(lengths.max())
        padded = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=self.device)
        sizes = torch.tensor([len(group) for group in groups], device=self.device)
        first = len(self.rows) + sizes.cumsum(0) - sizes  # the first row of each group gets the prompt
        hidden = prefill(self.model, self.cache, padded, lengths, first)
        members = torch.arange(len(self.rows), len(self.rows) + int(sizes.sum()), device=self.device)
        owners = first.repeat_interleave(sizes)
        copies = members != owners
        self.cache.move(owners[copies], members[copies], longest)
        added = [row for group in groups for row in group]
        self.rows += added
        self.slots_B = torch.cat([self.slots_B, lengths.repeat_interleave(sizes) - 1])
        self.tokens_B = torch.cat([self.tokens_B, torch.zeros_like(members)])
        self._draw(hidden.repeat_interleave(sizes, dim=0), len(self.rows) - len(added))

    def _step(self) -> None:
        longest = int(self.slots_B.max()) + 1
        self._draw(self.decoder.step(self.cache, self.tokens_B, self.slots_B, longest), 0)

    def _draw(self, hidden: Tensor, start: int) -> None:
        """Choose the next token of rows `start` and later from their hidden states, then drop finished rows."""
        rows = self.rows[start:]
        if start or len(rows) != len(self.parameters.greedy):
            self.parameters = RowSampling.of([row.config for row in rows], self.device)
        keys = np.array([row.key for row in rows], dtype=np.uint64)
        steps = np.array([len(row.sample.token_ids) for row in rows], dtype=np.uint64)
        uniform = torch.from_numpy(uniforms(keys, steps)).to(self.device)
        tokens, logprobs, policy = choose(upcast(self.model.logits(hidden)), self.parameters, uniform)
        self.tokens_B[start:] = tokens
        self.slots_B[start:] += 1
        values = zip(rows, tokens.tolist(), logprobs.tolist(), policy.tolist(), strict=True)
        done = [start + i for i, (row, *value) in enumerate(values) if self._record(row, *value)]
        if start or done:
            self._drop(done)

    def _record(self, row: _Row, token: int, logprob: float, policy_logprob: float) -> bool:
        if self.on_token is not None:
            self.on_token(row.prompt, row.number, token)
        return row.add(token, logprob, policy_logprob)

    def _drop(self, done: list[int]) -> None:
        """Fill the rows of finished samples with the last rows, so that active rows stay without gaps."""
        finished = set(done)
        count = len(self.rows) - len(done)
        holes = [i for i in done if i < count]
        movers = [i for i in range(count, len(self.rows)) if i not in finished]
        if holes:
            source, target = (torch.tensor(x, device=self.device) for x in (movers, holes))
            self.cache.move(source, target, int(self.slots_B[source].max()))
            for values in (self.tokens_B, self.slots_B):
                values[target] = values[source]
            for mover, hole in zip(movers, holes, strict=True):
                self.rows[hole] = self.rows[mover]
        del self.rows[count:]
        self.tokens_B, self.slots_B = self.tokens_B[:count].clone(), self.slots_B[:count].clone()
        self.parameters = RowSampling.of([row.config for row in self.rows], self.device)
