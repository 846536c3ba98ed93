"""The domain of a document (web, code, math or knowledge) by a linear classifier over words and symbols."""

import hashlib
import re
from collections.abc import Sequence

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import LinearSVC

DOMAINS = ("web", "code", "math", "knowledge")
CHARACTERS = 3000

# names that give away where the labelled examples come from rather than what they are about
_CUES = re.compile(
    r"\b(sympy|scipy|numpy|networkx|np|sp|nx|python|pypi|pip|versionadded|versionchanged)\b", re.IGNORECASE
)
_TOKENS = r"[^\W\d_]+|\d+|_+|[^\w\s]|\n[ \t]*"


class DomainClassifier:
    """TF-IDF of words, symbols and indentation into a linear support vector machine, the same on every machine."""

    def __init__(self, texts: Sequence[str], domains: Sequence[str], seed: int, test_fraction: float) -> None:
        """Fit on the labelled examples, but for a share that measures accuracy, overall and by domain.

        Raises ValueError when the training share holds fewer than two domains.
        """
        tested = [_in_test(text, seed, test_fraction) for text in texts]
        train = [(t, d) for t, d, test in zip(texts, domains, tested, strict=True) if not test]
        self._model: Pipeline = make_pipeline(
            TfidfVectorizer(
                token_pattern=_TOKENS, ngram_range=(1, 2), min_df=2, sublinear_tf=True, max_features=50_000
            ),
            LinearSVC(C=1.0, class_weight="balanced", random_state=seed),
        )
        self._model.fit([_evidence(text) for text, _ in train], [domain for _, domain in train])
        held = [(t, d) for t, d, test in zip(texts, domains, tested, strict=True) if test]
        predicted = self.predict([text for text, _ in held])
        right = [(domain, domain == found) for (_, domain), found in zip(held, predicted, strict=True)]
        self.test_examples = len(held)
        self.accuracy = _mean([hit for _, hit in right])
        self.accuracy_by_domain = {
            name: _mean([hit for domain, hit in right if domain == name]) for name in sorted({d for d, _ in right})
        }

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The domain of each text, from its beginning."""
        return [str(domain) for domain in self._model.predict([_evidence(text) for text in texts])] if texts else []


def _in_test(text: str, seed: int, fraction: float) -> bool:
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _evidence(text: str) -> str:
    return _CUES.sub(" ", text[:CHARACTERS])


def _mean(hits: Sequence[bool]) -> float:
    return round(sum(hits) / max(len(hits), 1), 4)
