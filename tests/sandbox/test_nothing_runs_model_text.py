"""No stage executes what a model wrote: not K2's own code, and not the verifiers of others that score answers.

What would have to (a tool or a verifier that runs programs) goes through `k2.sandbox`, and is then named here.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from k2.errors import UserError
from k2.evaluation.tasks import get_task

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for part in ("src", "components", "pipelines") for path in (ROOT / part).rglob("*.py"))
EXECUTES = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    *("os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "os.spawnv"),
    *("pickle.load", "pickle.loads", "marshal.loads", "torch.load", "yaml.load", "yaml.unsafe_load", "joblib.load"),
}
PROCESSES = {
    "os.posix_spawn",
    "runpy.run_path",
    "runpy.run_module",
    *(f"subprocess.{name}" for name in ("run", "Popen", "check_call")),
}
PROCESSES |= {"subprocess.call", "subprocess.check_output"}
STARTS = {
    "src/k2/agentic/mcp.py": "git, with arguments of K2's own, to prepare scratch repositories",
    "src/k2/commands/images.py": "skopeo, on names of the deployment file",
    "src/k2/commands/model.py": "the benchmarks of this repository",
    "src/k2/execution/local.py": "kfp's local runner",
    "src/k2/execution/warm.py": "the interpreter that imports torch ahead of steps",
    "src/k2/kernels/cpu/build.py": "the C compiler, on K2's own sources",
    "src/k2/sandbox/inside.py": "the sandbox: the one place for programs that nobody has read",
    "src/k2/store/embedded.py": "the object store",
}
"""Files that start programs, and which."""

SCORED = """
import json, sys
from k2.evaluation.tasks import REASONING_GYM, ReasoningGym
hostile = ["__import__('os').system('true')", "[__import__('os').getpid()]", "(lambda: 40 + 2)()"]
seen = []
def watch(event, arguments):
    if event == "compile" and any(text in str(arguments[0]) for text in ("__import__", "lambda: 40")):
        seen.append(event)
    elif event in ("os.system", "subprocess.Popen"):
        seen.append(event)
tasks = {name: ReasoningGym(f"reasoning_gym/{name}") for name in (*REASONING_GYM, "countdown")}
drawn = {name: task.draw(0, 0) for name, task in tasks.items()}
for name, task in tasks.items():
    task.score(drawn[name], drawn[name].answer["content"])
sys.addaudithook(watch)
executed = set()
for name, task in tasks.items():
    for text in hostile:
        task.score(drawn[name], text)
    if seen:
        executed.add(name)
    seen.clear()
print(json.dumps(sorted(executed)))
"""
"""Every family that K2 offers, and one that it does not, scores programs while the interpreter tells what it runs."""


@cache
def called(path: Path) -> frozenset[str]:
    """What a file calls: `name`, or `module.name`."""
    return frozenset(_called(path))


def _called(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name):
                yield function.id
            elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                yield f"{function.value.id}.{function.attr}"


def test_k2_evaluates_no_text() -> None:
    assert {path.name for path in SOURCES if called(path) & (EXECUTES | ATTRIBUTES)} == set()


def test_programs_are_started_where_it_is_known() -> None:
    assert {str(path.relative_to(ROOT)) for path in SOURCES if called(path) & PROCESSES} == set(STARTS)


def test_models_bring_no_code_of_their_own() -> None:
    assert [path for path in SOURCES if "trust_remote_code=True" in path.read_text()] == []


def test_verifiers_of_others_execute_no_answer() -> None:
    """reasoning_gym's countdown does, which is what this looks like; K2 refuses it."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", SCORED], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == ["countdown"]


@pytest.mark.parametrize("family", ["countdown", "puzzle24", "n_queens", "codeio", "polynomial_multiplication"])
def test_families_whose_verifier_executes_answers_are_refused(family: str) -> None:
    with pytest.raises(UserError, match=f"unknown task 'reasoning_gym/{family}'"):
        get_task(f"reasoning_gym/{family}")
