"""Raw text to plain normalised text: HTML rendered, encodings and whitespace repaired."""

import re

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.formatters import FTFYFormatter
from inscriptis import get_text
from loguru import logger

logger.disable("datatrove")  # here, because every worker process of its executor imports this module

_TRAILING_SPACE = re.compile(r"[^\S\n]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")
# entities stay: in code and in prose about markup they are content
_FTFY = FTFYFormatter(unescape_html=False, fix_line_breaks=True, normalization="NFC")


def normalize(text: str, form: str = "text") -> str:
    """One spelling of a text: NFC, mojibake repaired, no control characters, LF, at most one blank line."""
    text = _FTFY.format(get_text(text) if form == "html" else text)
    return _BLANK_LINES.sub("\n\n", _TRAILING_SPACE.sub("", text)).strip()


def normalize_documents(data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
    """`normalize` as a datatrove step; a document that becomes empty goes on, so that numbering stays."""
    for document in data:
        document.text = normalize(document.text, document.metadata.get("format", "text"))
        yield document
