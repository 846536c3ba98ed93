"""Artifact keys: a digest over everything that decides a stage's bytes.

The code digest covers the k2 source files in the stage module's static import closure, and C beside a package's
`__init__.py`, read from wherever the package is installed, so that a clone, a wheel and an image agree. Git state,
version strings and paths take no part.
"""

import ast
import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import k2
from k2.config.base import Section, canonical_json, semantic_values
from k2.execution.registry import NUMERICS, StageSpec
from k2.store.artifacts import SCHEMA_VERSION, Artifact

_ROOT = Path(k2.__file__).parent


def artifact_key(spec: StageSpec, config: Section, inputs: Mapping[str, Artifact], external: str | None) -> str:
    """Hex SHA-256 that names what `spec` makes from this configuration, these inputs and this code."""
    return _sha256(
        canonical_json(
            {
                "stage": spec.name,
                "schema": SCHEMA_VERSION,
                "config": semantic_values(config),
                "inputs": {name: artifact.digest for name, artifact in inputs.items()},
                "code": code_digest(spec.module),
                "packages": package_versions((*NUMERICS, *spec.packages)),
                "external": external,
            }
        )
    )


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Public versions of distributions (`2.13.0`, not `2.13.0+cpu`)."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in sorted(set(names))}


@cache
def code_digest(module: str) -> str:
    """Hex SHA-256 over the source files `module` reaches through imports inside k2."""
    files = {name: [_source(name), *_c_sources(name)] for name in sorted(import_closure(module))}
    rows = [(name, _sha256(path.read_text(encoding="utf-8"))) for name, paths in files.items() for path in paths]
    return _sha256(canonical_json(rows))


def import_closure(module: str) -> set[str]:
    """Names of the k2 modules that `module` imports, directly or not, at top level or inside functions."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        waiting.extend(_imported(name))
    return seen


def _imported(module: str) -> Iterator[str]:
    """The k2 modules named by import statements of one module, with their parent packages."""
    for node in ast.walk(ast.parse(_source(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                parent = ".".join(parts[:end])
                if parts[0] == "k2" and _exists(parent):
                    yield parent


def _file(module: str) -> Path:
    base = _ROOT.joinpath(*module.split(".")[1:])
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


@cache
def _exists(module: str) -> bool:
    return _file(module).is_file()


def _source(module: str) -> Path:
    path = _file(module)
    if not path.is_file():
        raise ModuleNotFoundError(f"{module} has no source file at {path}")
    return path


def _c_sources(module: str) -> list[Path]:
    path = _file(module)
    return sorted(path.parent.glob("*.[ch]")) if path.name == "__init__.py" else []


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
