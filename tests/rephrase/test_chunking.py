"""Chunks are lossless, bounded, and cut where a reader would cut."""

from hypothesis import given
from hypothesis import strategies as st

from k2.rephrase.chunking import count_tokens, split

prose = st.lists(st.sampled_from(["word", "a", "x_1", "Sum.", "why?", " ", "  ", "\n", "\n\n", "\t\n \n", "é", "3.5;"]))


@given(st.one_of(st.text(), prose.map("".join), prose.map(" ".join)), st.integers(16, 64))
def test_joining_gives_the_document_back(text: str, limit: int) -> None:
    chunks = split(text, limit)
    assert "".join(chunks) == text
    assert all(chunks)


@given(prose.map(" ".join), st.integers(16, 40))
def test_no_chunk_exceeds_the_limit(text: str, limit: int) -> None:
    assert all(count_tokens(chunk) <= limit for chunk in split(text, limit))


def test_paragraphs_before_sentences_before_words() -> None:
    paragraph = "One two three four. Five six seven eight."
    assert split(f"{paragraph}\n\n{paragraph}", 10) == [f"{paragraph}\n\n", paragraph]
    assert split(paragraph, 5) == ["One two three four. ", "Five six seven eight."]
    assert split("one two three four", 2) == ["one two ", "three four"]


def test_a_word_longer_than_the_limit_stays_whole() -> None:
    assert split("a.b.c.d.e.f", 4) == ["a.b.c.d.e.f"]
