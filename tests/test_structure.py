"""The rules that keep the project simple: what may import what, how long things may be, what commands cost."""

import ast
import resource
import subprocess
import sys
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


def run_python(code: str) -> str:
    run = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    return run.stderr


@pytest.mark.parametrize(
    "code",
    ["import k2", "import k2.config.k2", "import k2.store.artifacts", "import k2.cli", "import k2.execution.runner"],
)
def test_nothing_heavy_is_imported_before_it_computes(code: str) -> None:
    modules = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in run_python(code).splitlines()}
    assert not modules & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["config", "show", "tiny"]])
def test_light_commands_are_light(arguments: list[str]) -> None:
    """Half a second of CPU time: wall time says more about the machine's other work."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "k2.cli", *arguments], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
