"""The default corpus: real prose, mathematics and code that the Python environment itself carries.

Sources are read, never imported. Each yields documents in a seeded order of its files, and a part of the files
is set aside for the labelled examples, so that the domain classifier never learns from a document it labels.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import pydoc_data.topics
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from k2.config.corpus import CorpusConfig, SourceName
from k2.data.documents import Document, Problem, Record, stable_order

DOMAINS: dict[SourceName, str] = {
    "topics": "knowledge",
    "stdlib": "knowledge",
    "sympy": "math",
    "scipy": "math",
    "code": "code",
    "projects": "web",
}
"""What is known about a source; numpy and networkx mix reference text and mathematics, so they carry no label."""

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3"})

# Files are dealt out in fours. What is code and what is read for its docstrings never overlaps, or prose of one
# document would stand inside another. The topics are few and long and give no labelled examples.
_SHARES: dict[SourceName, tuple[int, ...]] = {"topics": (0, 1, 2, 3), "stdlib": (1, 2), "code": (3,)}
_LABELLED_SHARE: dict[SourceName, tuple[int, ...]] = {"topics": ()}
Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def version(source: SourceName) -> str:
    """Name and version of what a source is taken from."""
    if source in ("topics", "stdlib", "code"):
        return f"python {platform.python_version()}"
    if source == "projects":
        names = sorted({f"{d.metadata['Name']} {d.version}" for d in importlib.metadata.distributions()})
        return f"{len(names)} installed projects, sha256 {hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]}"
    return f"{source} {importlib.metadata.version(source)}"


def read(source: SourceName, config: CorpusConfig, *, labelled: bool) -> Iterator[Record]:
    """The documents of a source, or the share of it that is set aside for labelled examples."""
    files, documents = _SOURCES[source](source, config)
    share = _LABELLED_SHARE.get(source, (0,)) if labelled else _SHARES.get(source, (1, 2, 3))
    for index, name in enumerate(stable_order(files, config.seed)):
        for record in documents(files[name], name) if index % 4 in share else ():
            if isinstance(record, Document) and source in DOMAINS:
                record.meta["domain"] = DOMAINS[source]
            yield record


Reader = tuple[dict[str, str], Callable[[str, str], Iterator[Record]]]


def _topics(source: str, config: CorpusConfig) -> Reader:
    topics: dict[str, str] = pydoc_data.topics.topics
    return topics, lambda text, name: iter([Document(f"{source}:{name}", text, source)])


def _projects(source: str, config: CorpusConfig) -> Reader:
    return _descriptions(), lambda text, name: iter([Document(f"{source}:{name}", text, source)])


@cache
def _descriptions() -> dict[str, str]:
    """The project pages of installed packages, as their index shows them."""
    found = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata.json
        text = str(metadata.get("description", ""))
        if len(text) >= 500:
            found[str(metadata["name"]).lower()] = text
    return found


def _code(source: str, config: CorpusConfig) -> Reader:
    return _python_files(_stdlib()), lambda path, name: _whole_file(source, path, name)


def _docstring_source(source: str, config: CorpusConfig) -> Reader:
    def documents(path: str, name: str) -> Iterator[Record]:
        return _docstrings(source, path, name, config.min_characters)

    return _python_files(_stdlib() if source == "stdlib" else _package(source)), documents


_SOURCES: dict[SourceName, Callable[[str, CorpusConfig], Reader]] = {
    "topics": _topics,
    "stdlib": _docstring_source,
    "sympy": _docstring_source,
    "scipy": _docstring_source,
    "numpy": _docstring_source,
    "networkx": _docstring_source,
    "code": _code,
    "projects": _projects,
}


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(name)
    return Path(spec.origin).parent


@cache
def _python_files(root: Path) -> dict[str, str]:
    """Relative name and path of each source file that is not a test."""
    paths = ((path.relative_to(root), path) for path in root.rglob("*.py"))
    return {rel.as_posix(): str(path) for rel, path in paths if not _SKIPPED_FOLDERS & set(rel.parts)}


def _whole_file(source: str, path: str, name: str) -> Iterator[Record]:
    try:
        yield Document(f"{source}:{name}", Path(path).read_text(encoding="utf-8"), source)
    except UnicodeDecodeError:
        yield Problem(f"{source}:{name}", "not UTF-8")


def _docstrings(source: str, path: str, name: str, min_characters: int) -> Iterator[Record]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        definitions = _definitions(_parse(text), "") if _may_hold(text, min_characters) else ()
        for qualified, node in definitions:
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= min_characters:
                yield Document(f"{source}:{name}:{qualified}", docstring, source)
    except UnicodeDecodeError:
        yield Problem(f"{source}:{name}", "not UTF-8")
    except SyntaxError:
        yield Problem(f"{source}:{name}", "not Python")


def _may_hold(text: str, min_characters: int) -> bool:
    """Whether a docstring of that length is possible; parsing is the cost of collecting, and many files have none."""
    parts = text.split('"""')
    unclear = len(parts) % 2 == 0 or "'''" in text
    return unclear or any(len(part) >= min_characters for part in parts[1::2])


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the sources of others
        return ast.parse(text)


def _definitions(node: Definition, name: str) -> Iterator[tuple[str, Definition]]:
    """The module, its classes and functions, in the order of the file, with their qualified names."""
    yield name, node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(child, f"{name}.{child.name}".lstrip("."))
