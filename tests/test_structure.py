"""The rules that keep the project simple: what may import what, how long things may be, what commands cost."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "k2").rglob("*.py"))
HEAVY = {"torch", "transformers", "sklearn", "datatrove", "sympy", "kfp"}


def imports(path: Path, *, top_level: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_size(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 100, f"{node.name} is too long"


@pytest.mark.parametrize("package", ["config", "store"])
def test_configuration_and_storage_never_import_torch(package: str) -> None:
    for path in (ROOT / "src" / "k2" / package).rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path, top_level=False)} & HEAVY, path


def test_the_model_never_imports_distributed() -> None:
    for path in (ROOT / "src" / "k2" / "model").rglob("*.py"):
        assert not [name for name in imports(path, top_level=False) if name.startswith("torch.distributed")], path


@pytest.mark.parametrize("path", sorted((ROOT / "components").rglob("component.py")), ids=names)
def test_components_are_thin(path: Path) -> None:
    assert {name.split(".")[0] for name in imports(path, top_level=True)} <= {"kfp"} | sys.stdlib_module_names
    assert len(path.read_text().splitlines()) <= 40


def test_dependencies_point_one_way() -> None:
    """config and store know nothing of what is built on them; stages are imported by nobody."""
    for path in SOURCES:
        package = path.relative_to(ROOT / "src" / "k2").parts[0]
        reached = {name.split(".")[1] for name in imports(path, top_level=False) if name.startswith("k2.")}
        if package == "config":
            assert reached <= {"config", "errors", "model"}, path
        if package == "store":
            assert reached <= {"store", "errors"}, path
        if package not in ("commands", "execution"):
            assert not reached & {"commands", "cli"}, path
        assert "stages" not in reached or package == "stages", path


def run_python(code: str) -> tuple[str, float]:
    started = time.process_time()
    run = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    return run.stderr, time.process_time() - started


@pytest.mark.parametrize(
    "code",
    ["import k2", "import k2.config.k2", "import k2.store.artifacts", "import k2.cli", "import k2.execution.runner"],
)
def test_nothing_heavy_is_imported_before_it_computes(code: str) -> None:
    loaded, _ = run_python(code)
    modules = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in loaded.splitlines()}
    assert not modules & HEAVY


def test_help_is_quick() -> None:
    """Best of three, since machines are noisy: `k2 --help` within half a second."""
    walls = []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "k2.cli", "--help"], capture_output=True, check=True)
        walls.append(time.monotonic() - started)
    assert min(walls) < 0.5
