"""Sections of the report on data: corpus, ingest, rephrasing, tokens, and the synthesised trajectories."""

from collections.abc import Mapping
from typing import Any

from k2.monitoring.blocks import (
    Block,
    Chat,
    Figure,
    Missing,
    Pair,
    Prose,
    StageView,
    Table,
    Turn,
    clip,
    counts_facts,
    facts,
)
from k2.monitoring.figures import bars, histogram
from k2.monitoring.format import number, size
from k2.serving.chat_template import content_text

Views = Mapping[str, StageView]


def corpus_section(views: Views) -> list[Block]:
    """What was collected, what was kept of it, and why the rest was not."""
    corpus, ingest, tokens = views["corpus"], views["ingest"], views["tokenize"]
    blocks: list[Block] = [_sources(corpus), *_kept(ingest)]
    problems = counts_facts(corpus.get("problems"), "Records that could not be read.")
    if problems:
        blocks.append(problems)
    blocks.append(_tokens(tokens))
    return blocks


def _sources(corpus: StageView) -> Block:
    sources = corpus.get("sources")
    if not sources:
        return corpus.missing("the sources of the corpus")
    rows = [[name, number(each["documents"]), size(each["bytes"])] for name, each in sorted(sources.items())]
    return Table(("source", "documents", "text"), rows, "Where the text came from.")


def _kept(ingest: StageView) -> list[Block]:
    if not ingest.report:
        return [ingest.missing("what ingest kept and dropped")]
    kept, total, held = ingest.get("kept"), ingest.get("documents"), ingest.get("heldout")
    blocks: list[Block] = []
    if None not in (kept, total, held):
        text = f"Of {number(total)} documents {number(kept)} are trained on and {number(held)} are held out."
        accuracy = ingest.get("classifier_accuracy")
        if accuracy is not None:
            text += f" The domain classifier is right on {accuracy:.1%} of the labelled test documents."
        blocks.append(Prose(text))
    for key, caption in (("dropped", "Documents dropped, by reason."), ("domains", "Documents kept, by domain.")):
        counts = ingest.get(key)
        ordered = sorted((counts or {}).items(), key=lambda item: (-item[1], item[0]))
        blocks.append(Figure(bars(caption, ordered), caption) if ordered else ingest.missing(caption))
    return blocks


def _tokens(tokens: StageView) -> Block:
    names = ("vocab_size", "train_tokens", "heldout_tokens", "bytes_per_token", "heldout_bytes_per_token")
    block = facts({name: tokens.get(name) for name in names}, "The tokenizer and what it made.")
    return block or tokens.missing("tokens")


def rephrase_section(views: Views, examples: int) -> list[Block]:
    """How many rewrites were accepted, why the others were not, and some of each to read."""
    view = views["rephrase"]
    blocks: list[Block] = []
    chunks, accepted, rejected = (view.metric(name) for name in ("chunks", "accepted", "rejected"))
    if None in (chunks, accepted, rejected):
        blocks.append(view.missing("accepted and rejected chunks"))
    else:
        similarity = view.metric("mean_similarity")
        text = f"Of {number(chunks)} chunks {number(accepted)} rewrites were accepted and {number(rejected)} rejected."
        blocks.append(Prose(text + (f" Mean similarity {number(similarity)}." if similarity is not None else "")))
    reasons = counts_facts(view.metric("reasons"), "Why rewrites were rejected, in chunks; a chunk may have several.")
    blocks += [reasons] if reasons else []
    blocks.append(_similarities(view))
    pairs: list[Block] = [_pair(row, True) for row in (view.get("accepted_examples") or [])[:examples]]
    pairs += [_pair(row, False) for row in (view.get("rejected_examples") or [])[:examples]]
    return [*blocks, *pairs] if pairs else [*blocks, view.missing("examples of rewrites")]


def _similarities(view: StageView) -> Block:
    """The histogram of similarity, without empty bins at its ends."""
    edges, counts = view.get("similarity_histogram.edges"), view.get("similarity_histogram.counts")
    used = [index for index, count in enumerate(counts or []) if count]
    if not used:
        return view.missing("similarity of rewrites to their sources")
    first, last = used[0], used[-1] + 1
    figure = histogram("Similarity", edges[first : last + 1], counts[first:last], x_label="cosine similarity")
    return Figure(figure, "Similarity of every rewrite to its source, accepted or not.")


def _pair(row: Mapping[str, Any], good: bool) -> Pair:
    meta = [row["style"], f"similarity {row['similarity']:.3f}", *row["reasons"]]
    return Pair("accepted" if good else "rejected", good, " · ".join(meta), clip(row["source"]), clip(row["rewrite"]))


def trajectory_section(views: Views) -> list[Block]:
    """How the trajectories were judged, how far the judge can be trusted, and one of each kind to read."""
    view = views["synthesize"]
    if not view.report:
        return [view.missing("trajectories")]
    blocks: list[Block] = [_trajectory_counts(view)]
    table = counts_facts(view.get("rejected_by_reason"), "Trajectories rejected, by the criterion they failed.")
    blocks += [table] if table else []
    for key, word in (("accepted_example", "accepted"), ("rejected_example", "rejected")):
        record = view.get(key)
        blocks.append(_chat(record, word) if record else Missing(f"example of a trajectory that was {word}"))
    return blocks


def _trajectory_counts(view: StageView) -> Block:
    names = ("tools", "mcp_tools", "domains", "tasks", "trajectories", "accepted")
    values = {name: view.get(name) for name in names} | (view.get("judge") or {})
    caption = "Tools, tasks and verdicts, and the judge against the hidden truth."
    return facts(values, caption) or view.missing("counts of trajectories")


def _chat(record: Mapping[str, Any], word: str) -> Chat:
    tools = [tool["function"]["name"] for tool in record.get("tools") or []]
    scores = ", ".join(f"{name} {number(value)}" for name, value in (record.get("scores") or {}).items())
    reasons = f" because of {', '.join(record['reasons'])}" if record.get("reasons") else ""
    caption = f"Trajectory {record['id']}, {word}{reasons}. Scores: {scores}." if scores else f"Trajectory, {word}."
    return Chat(caption, [_turn(message) for message in record["messages"]], tools)


def _turn(message: Mapping[str, Any]) -> Turn:
    functions = [call["function"] for call in message.get("tool_calls") or []]
    calls = [(function["name"], str(function["arguments"])) for function in functions]
    return Turn(message["role"], content_text(message.get("content")), calls)
