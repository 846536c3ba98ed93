"""The embedded generator: SmolLM2-135M-Instruct, batched, seeded, offline.

Shapes: B batch, L length, V vocabulary, T most probable tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor

from k2.generation.llama import Llama
from k2.generation.protocol import Completion, FinishReason, GenerationRequest, Message, StreamCallback, Usage
from k2.generation.weights import find_gguf, load_checkpoint

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
MAX_ROWS = 64  # beyond it attention over the cache costs what the shared matrix products save
MAX_NUCLEUS = 256  # sampling looks at this many most probable tokens at most
PREFILL_TOKENS = 4096  # bounds the activations of a prefill


@dataclass
class _Row:
    """One answer in the making."""

    index: int
    request: GenerationRequest
    prompt: list[int]
    random: torch.Generator
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    streamed: int = 0
    finish: FinishReason | None = None


class SmolLM:
    """A `Generator`. The composition of batches follows from the requests alone, so answers are reproducible."""

    def __init__(self, batch_tokens: int) -> None:
        """Load the weights; `batch_tokens` bounds the cache (23 kB a token). Raises UserError without the package."""
        checkpoint = load_checkpoint(find_gguf())
        self.model = Llama(checkpoint.shape, checkpoint.tensors)
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        self.end = self.tokenizer.token_to_id("<|im_end|>")
        self.context = checkpoint.shape.max_position_embeddings
        self.batch_tokens = batch_tokens
        self.identity = f"smollm2-135m-instruct:{checkpoint.digest[:16]}:{batch_tokens}"

    def generate(
        self, requests: Sequence[GenerationRequest], *, stream: StreamCallback | None = None
    ) -> list[Completion]:
        """Answer every request, in order; longest prompts first, so that a batch holds similar lengths."""
        rows = [self._row(index, request) for index, request in enumerate(requests)]
        with torch.inference_mode():
            for batch in self._batches(rows):
                self._run(batch, stream)
        return [self._completion(row) for row in rows]

    def _row(self, index: int, request: GenerationRequest) -> _Row:
        prompt = self.tokenizer.encode(chat_prompt(request.messages), add_special_tokens=False).ids
        room = self.context - request.max_tokens
        random = torch.Generator().manual_seed(request.seed)
        if len(prompt) <= room:
            return _Row(index, request, prompt, random)
        reason = f"the prompt has {len(prompt)} tokens; the model has room for {room}"
        return _Row(index, request, prompt, random, text=reason, finish="error")

    def _batches(self, rows: list[_Row]) -> list[list[_Row]]:
        batches: list[list[_Row]] = []
        width = 0
        pending = [row for row in rows if row.finish is None]
        for row in sorted(pending, key=lambda row: (-len(row.prompt), row.prompt, row.index)):
            width = max(width, len(row.prompt) + row.request.max_tokens)
            full = not batches or len(batches[-1]) == MAX_ROWS or width * (len(batches[-1]) + 1) > self.batch_tokens
            if full:
                batches.append([])
                width = len(row.prompt) + row.request.max_tokens
            batches[-1].append(row)
        return batches

    def _run(self, rows: list[_Row], stream: StreamCallback | None) -> None:
        longest = max(len(row.prompt) for row in rows)
        slots = longest + max(row.request.max_tokens for row in rows)
        pad_B = torch.tensor([longest - len(row.prompt) for row in rows])
        cache, logits_BV = self._prefill(rows, longest, slots)
        for slot in range(longest, slots + 1):
            self._extend(rows, logits_BV, stream)
            live = [n for n, row in enumerate(rows) if row.finish is None]
            if not live:
                return
            if len(live) <= 0.75 * len(rows):
                keep = torch.tensor(live)
                rows, cache, pad_B = [rows[n] for n in live], cache[:, :, keep], pad_B[keep]
            ids_BL = torch.tensor([[row.ids[-1]] for row in rows])
            logits_BV = self.model.forward(ids_BL, cache, slot, pad_B)

    def _prefill(self, rows: list[_Row], longest: int, slots: int) -> tuple[Tensor, Tensor]:
        """Cache and next-token logits of the prompts; equal prompts (samples of one request) are computed once."""
        distinct = sorted({tuple(row.prompt) for row in rows}, key=lambda prompt: (-len(prompt), prompt))
        at = {prompt: n for n, prompt in enumerate(distinct)}
        source = torch.tensor([at[tuple(row.prompt)] for row in rows])
        cache = self.model.new_cache(len(distinct), slots)
        logits = []
        step = max(1, PREFILL_TOKENS // longest)
        for start in range(0, len(distinct), step):
            part = distinct[start : start + step]
            pad_B = torch.tensor([longest - len(prompt) for prompt in part])
            ids_BL = torch.tensor([[self.end] * (longest - len(prompt)) + list(prompt) for prompt in part])
            logits.append(self.model.forward(ids_BL, cache[:, :, start : start + step], 0, pad_B))
        return cache[:, :, source], torch.cat(logits)[source]

    def _extend(self, rows: list[_Row], logits_BV: Tensor, stream: StreamCallback | None) -> None:
        """Choose the next token of every unfinished row."""
        logprobs_BT, tokens_BT = torch.topk(torch.log_softmax(logits_BV, -1), MAX_NUCLEUS)
        for row, logprobs_T, tokens_T in zip(rows, logprobs_BT, tokens_BT, strict=True):
            if row.finish is None:
                choice = _choose(logprobs_T, row.request, row.random)
                self._append(row, int(tokens_T[choice]), float(logprobs_T[choice]), stream)

    def _append(self, row: _Row, token: int, logprob: float, stream: StreamCallback | None) -> None:
        row.ids.append(token)
        row.logprobs.append(logprob)
        row.text = self.tokenizer.decode(row.ids, skip_special_tokens=True)
        stops = [at for stop in row.request.stop if (at := row.text.find(stop)) >= 0]
        if stops:
            row.text = row.text[: min(stops)]
        if token == self.end or stops:
            row.finish = "stop"
        elif len(row.ids) >= row.request.max_tokens:
            row.finish = "length"
        # A trailing replacement character is half of a character whose other bytes are still to come.
        if stream is not None and len(row.text) > row.streamed and not row.text.endswith("\ufffd"):
            stream(row.index, row.text[row.streamed :])
            row.streamed = len(row.text)

    def _completion(self, row: _Row) -> Completion:
        usage = Usage(len(row.prompt), len(row.ids))
        return Completion(row.text, tuple(row.ids), tuple(row.logprobs), row.finish or "length", usage)


def chat_prompt(messages: Sequence[Message]) -> str:
    """SmolLM2's chat template, with its default system message, ending where the assistant begins."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM}, *messages]
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def _choose(logprobs_T: Tensor, request: GenerationRequest, random: torch.Generator) -> int:
    """Index of the sampled token: greedy at temperature 0, else nucleus sampling by inverse CDF."""
    if request.temperature == 0:
        return 0
    probability_T = torch.softmax(logprobs_T / request.temperature, -1)
    mass_T = probability_T.cumsum(-1)
    # Keep the smallest set that reaches top_p: a token counts while the mass before it is below top_p.
    kept = int((mass_T - probability_T < request.top_p).sum())
    draw = torch.rand((), generator=random) * mass_T[kept - 1]
    return min(int(torch.searchsorted(mass_T, draw)), kept - 1)
