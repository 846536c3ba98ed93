"""Rewriting chunk by chunk: what the model sees, what is kept, how the document is put together."""

from collections.abc import Sequence

import pytest

from k2.config.rephrase import RephraseConfig
from k2.generation.protocol import Completion, FinishReason, GenerationRequest, StreamCallback
from k2.rephrase.embedding import Embedder
from k2.rephrase.generation import plan, rewrite_all, stitch
from k2.rephrase.prompts import KNOWLEDGE, MATHEMATICS, Turn, messages
from k2.rephrase.results import attempt_rows, metrics, report
from k2.rephrase.selection import choose, plain_share, prose, term_share

FIRST = "Rivers carry water from the mountains to the sea. They shape the valleys they cross.\n\n"
SECOND = "Lakes store the water of rivers. Some of them dry out in hot summers.\n"
REWRITES = {
    FIRST.strip(): "Water is carried by rivers out of mountains towards the sea; valleys are shaped on the way.",
    SECOND.strip(): "River water is stored by lakes, and in hot summers a few of these lakes dry out.",
}


class Author:
    """A generator that knows both rewrites; seeds listed as bad get nonsense."""

    identity = "author"

    def __init__(self, bad: Sequence[str] = (), finish: FinishReason = "stop") -> None:
        self.bad, self.finish = bad, finish
        self.calls: list[list[GenerationRequest]] = []

    def generate(
        self, requests: Sequence[GenerationRequest], *, stream: StreamCallback | None = None
    ) -> list[Completion]:
        self.calls.append(list(requests))
        chunks = [request.messages[-1]["content"].rpartition("\n\n")[2] for request in requests]
        texts = ["Nothing of that." if chunk in self.bad else REWRITES[chunk] for chunk in chunks]
        return [Completion(text, finish_reason=self.finish) for text in texts]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder()


def document(name: str, domain: str = "knowledge", text: str = FIRST + SECOND) -> dict[str, str]:
    return {"id": name, "domain": domain, "source": "test", "text": text, "passage": text}


def config(**values: object) -> RephraseConfig:
    return RephraseConfig(**{"chunk_tokens": 20, "min_words": 5, **values})


def test_chunks_see_what_came_before_and_are_stitched(embedder: Embedder, progress) -> None:
    author, settings = Author(), config()
    jobs = plan([document("a"), document("b")], settings)
    rewrite_all(jobs, author, embedder, settings, progress)
    assert [len(call) for call in author.calls] == [4, 4], "two waves over two rewrites of two documents"
    roles = [message["role"] for message in author.calls[1][0].messages]
    assert roles == ["system", "user"]
    context = author.calls[1][0].messages[0]["content"]
    assert FIRST.strip() in context
    assert REWRITES[FIRST.strip()] in context
    assert stitch(jobs[0], "drop") == REWRITES[FIRST.strip()] + "\n\n" + REWRITES[SECOND.strip()] + "\n"
    assert len({job.style for job in jobs[:2]}) == 2
    assert metrics(jobs)["context_chunks"] == 4
    assert progress.updates[-1]["accepted"] == 8


def test_a_rejected_chunk_stays_original_or_is_dropped(embedder: Embedder, progress) -> None:
    settings = config(rewrites_per_document=1)
    author = Author(bad=[FIRST.strip()])
    jobs = plan([document("a")], settings)
    rewrite_all(jobs, author, embedder, settings, progress)
    assert stitch(jobs[0], "keep_original") == FIRST + REWRITES[SECOND.strip()] + "\n"
    assert stitch(jobs[0], "drop") == REWRITES[SECOND.strip()] + "\n"
    context = author.calls[1][0].messages[0]["content"]
    assert context.count("Rivers carry water") == 1, "the source is still context"
    counted = metrics(jobs)
    assert (counted["chunks"], counted["accepted"], counted["rejected"]) == (2, 1, 1)
    assert counted["reasons"]["similarity"] == 1
    assert report(jobs)["rejected_examples"][0]["rewrite"] == "Nothing of that."


def test_no_accepted_chunk_means_no_rewritten_document(embedder: Embedder, progress) -> None:
    settings = config(rewrites_per_document=1)
    jobs = plan([document("a")], settings)
    rewrite_all(jobs, Author(bad=[FIRST.strip(), SECOND.strip()]), embedder, settings, progress)
    assert stitch(jobs[0], "keep_original") is None


def test_every_candidate_is_recorded_and_one_is_kept(embedder: Embedder, progress) -> None:
    settings = config(candidates=3, rewrites_per_document=1)
    author = Author()
    jobs = plan([document("a")], settings)
    rewrite_all(jobs, author, embedder, settings, progress)
    rows = list(attempt_rows(jobs))
    assert len(rows) == 6
    assert sum(row["kept"] for row in rows) == 2
    assert [row["context"] for row in rows] == [False] * 3 + [True] * 3
    asked = [request for call in author.calls for request in call]
    assert len({request.seed for request in asked}) == 6
    assert [request.temperature > 0 for request in asked] == [False, True, True] * 2


@pytest.mark.parametrize(("finish", "reason"), [("length", "cut_off"), ("error", "generation_failed")])
def test_an_unfinished_or_failed_answer_is_rejected_by_name(
    embedder: Embedder, progress, finish: FinishReason, reason: str
) -> None:
    settings = config(rewrites_per_document=1)
    jobs = plan([document("a")], settings)
    rewrite_all(jobs, Author(finish=finish), embedder, settings, progress)
    assert metrics(jobs)["reasons"] == {reason: 2}
    assert stitch(jobs[0], "keep_original") is None


def test_context_is_bounded(embedder: Embedder, progress) -> None:
    settings = config(context_tokens=0)
    author = Author()
    jobs = plan([document("a")], settings)
    rewrite_all(jobs, author, embedder, settings, progress)
    assert all(len(request.messages) == 1 for call in author.calls for request in call)
    assert metrics(jobs)["context_chunks"] == 0


def test_choice_takes_turns_between_domains_and_prefers_prose() -> None:
    table = "| 1 | 2 | 3 |\n" * 20
    rows = [document("k1"), document("m1", "math"), document("k2", text=SECOND), document("c", "code")]
    rows += [document("m2", "math", table), document("short", text="Too short.")]
    chosen = [row["id"] for row in choose(rows, config(max_documents=4))]
    assert [name[0] for name in chosen] == ["k", "m", "k", "m"]
    assert chosen.index("m1") < chosen.index("m2")
    assert choose(reversed(rows), config(max_documents=4)) == choose(rows, config(max_documents=4))
    twins = [document("k1"), document("k9"), document("k2", text=FIRST)]
    assert len(choose(twins, config())) == 2, "equal passages are rewritten once"


def test_only_prose_is_chosen_on_request() -> None:
    sections = "Parameters\n----------\nx : array\n    The array to sum over.\n\n>>> total([1, 2])\n3\n"
    formula = "Where f(x) = 2 * x + 1 holds for all x >= 0 and g is its inverse.\n\n"
    text = f"{FIRST}{sections}\n{formula}Lakes store the water\nof rivers.  Some dry out.\n"
    passage = prose(text)
    assert passage == f"{FIRST.strip()}\n\nLakes store the water of rivers. Some dry out."
    assert [row["passage"] for row in choose([document("a", text=text)], config(prose_only=True))] == [passage]
    assert [row["passage"] for row in choose([document("a", text=text)], config())] == [text]
    assert choose([document("a", text=sections)], config(prose_only=True)) == []


def test_shares_of_words() -> None:
    assert plain_share("| 1 | 2 | 3 |\n" * 20) < 0.1 < 0.9 < plain_share(FIRST)
    assert term_share("call my_func with 3 in Rome today") == pytest.approx(3 / 7)


def test_prompts_are_diverse_and_mathematics_becomes_a_learning_note() -> None:
    assert len({(style.style, style.perspective) for style in KNOWLEDGE}) >= 4
    assert {style.style for style in MATHEMATICS} == {"learning note"}
    context, asked = messages(KNOWLEDGE[0], "chunk", [Turn("kept out ", None), Turn("source", "rewrite")])
    assert context["content"].endswith("kept out\nsource\nYour rewrite of it: kept out\nrewrite")
    assert asked == {"role": "user", "content": f"{KNOWLEDGE[0].instruction}\n\nchunk"}
