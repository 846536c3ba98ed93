"""Each check catches what it is for, and a good paraphrase passes them all."""

import pytest

from k2.config.rephrase import FidelityConfig
from k2.rephrase.embedding import Embedder
from k2.rephrase.fidelity import Verdict, copied_share, names, numbers, repeated_share, verify

SOURCE = (
    "The Danube rises in the Black Forest and flows 2,850 kilometres through ten countries before it reaches "
    "the Black Sea. Only the Volga is a longer river in Europe."
)
FAITHFUL = (
    "Starting in the Black Forest, the Danube runs for 2850 km across 10 countries and ends in the Black Sea; "
    "in Europe, the Volga alone exceeds it in length."
)


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder()


def judge(rewrite: str, context: str = "", similarity: float = 0.95, **limits: float) -> Verdict:
    return verify(SOURCE, rewrite, similarity, FidelityConfig(**limits), context=context)


def test_a_faithful_paraphrase_is_accepted(embedder: Embedder) -> None:
    similarity = embedder.similarity(SOURCE, FAITHFUL)
    assert similarity > 0.8
    assert judge(FAITHFUL, similarity=similarity).reasons == ()


def test_embeddings_tell_meaning_apart(embedder: Embedder) -> None:
    other = embedder.similarity(SOURCE, "The stock market fell sharply after the bank raised its rates.")
    assert other < 0.3


@pytest.mark.parametrize(
    ("rewrite", "reason"),
    [
        (FAITHFUL.replace("2850", "3850"), "number_vanished"),
        (FAITHFUL.replace("2850", "3850"), "number_appeared"),
        (FAITHFUL.replace("Volga", "river").replace("Danube", "stream"), "name_vanished"),
        (FAITHFUL.replace("Volga", "Rhine"), "name_appeared"),
        (SOURCE, "copied"),
        ("Danube, Black Forest, 2,850, ten, Volga, Europe, Sea", "too_short"),
        (FAITHFUL + " It is a river." * 20, "too_long"),
        (FAITHFUL + " It is a river that flows." * 5, "repeats"),
        ("Here is the text: " + FAITHFUL, "leak"),
        (FAITHFUL + " I hope the rewritten text helps.", "leak"),
    ],
)
def test_each_fault_is_named(rewrite: str, reason: str) -> None:
    assert reason in judge(rewrite).reasons


def test_the_similarity_threshold_decides() -> None:
    assert judge(FAITHFUL, similarity=0.7499).reasons == ("similarity",)
    assert judge(FAITHFUL, similarity=0.8).accepted


def test_what_was_written_before_is_not_said_again() -> None:
    assert verify(SOURCE, FAITHFUL, 0.95, FidelityConfig(), written=FAITHFUL[:80]).reasons == ("repeats",)


def test_what_the_context_says_did_not_appear_from_nowhere() -> None:
    rewrite = FAITHFUL.replace("the Danube", "the Danube, the Ister of Herodotus,")
    assert "name_appeared" in judge(rewrite).reasons
    assert judge(rewrite, context="Herodotus called it the Ister.").accepted


def test_numbers_and_names() -> None:
    assert numbers("1,200 items, 3.5% of twelve in x2 or v1.2.3") >= {"1200", "3.5", "12"}
    assert "2" not in numbers("x2")
    text = "Call os.path.join() or my_func, then `loop` and someValue. The API of Python is nice."
    assert names(text) == {"os.path.join", "my_func", "loop", "someValue", "API", "Python"}


def test_shares() -> None:
    assert copied_share("a b c d e f", "a b c d e f") == 1
    assert copied_share("a b c d e f", "f e d c b a") == 0
    assert repeated_share("a b c d e " * 4) > 0.6
    assert repeated_share("a b") == 0
