"""Quality filters by domain: published rules for prose, rules on lines for code."""

from datatrove.data import Document
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter

from k2.config.ingest import QualityConfig
from k2.data.deduplicate import WORDS


class QualityFilter:
    """Why a document of a domain is refused, or None. Code is judged by its lines, prose by its words."""

    def __init__(self, config: QualityConfig) -> None:
        self._config = config
        repetition = GopherRepetitionFilter(language=WORDS)
        prose = [_gopher(config, config.min_alpha_words), repetition]
        self._filters: dict[str, list[BaseFilter]] = {
            "web": [*prose, FineWebQualityFilter(language=WORDS)],
            "knowledge": prose,
            "math": [_gopher(config, config.min_alpha_words_math), repetition],
        }

    def reason(self, text: str, domain: str) -> str | None:
        """The name of the first rule that a document breaks."""
        if domain == "code":
            return self._code(text)
        document = Document(text=text, id="")
        for rule in self._filters[domain]:
            verdict = rule.filter(document)
            if verdict is not True:
                return str(verdict[1])
        return None

    def _code(self, text: str) -> str | None:
        lengths = [len(line) for line in text.splitlines()]
        if max(lengths) > self._config.max_code_line:
            return "code_long_line"
        if sum(lengths) / len(lengths) > self._config.max_mean_code_line:
            return "code_long_lines"
        if sum(map(str.isalnum, text)) / len(text) < self._config.min_code_alphanumeric:
            return "code_symbols"
        return None


def _gopher(config: QualityConfig, min_alpha_words: float) -> GopherQualityFilter:
    return GopherQualityFilter(
        min_doc_words=config.min_words,
        max_doc_words=config.max_words,
        min_stop_words=config.min_stop_words,
        max_non_alpha_words_ratio=min_alpha_words,
        language=WORDS,
    )
