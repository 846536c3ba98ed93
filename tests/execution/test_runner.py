"""Running stages: done work is found again, broken work is made anew, and processes do not do it twice."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import zstandard
from click.testing import CliRunner

from k2.cli import main
from k2.config.tokenize import TokenizeConfig
from k2.errors import StageError, UserError
from k2.execution.chain import upstream
from k2.execution.runner import Outcome, execute, lookup
from k2.store.artifacts import Artifact
from k2.store.client import Store

CONFIG = TokenizeConfig(vocab_size=512)
Make = Callable[..., Artifact]


def documents(count: int, text: str = "the quick brown fox") -> bytes:
    rows = [{"id": str(i), "text": f"{text} {i} jumps.", "domain": "web", "source": "test"} for i in range(count)]
    return zstandard.compress("\n".join(json.dumps(row) for row in rows).encode())


@pytest.fixture
def inputs(make_artifact: Make) -> dict[str, Artifact]:
    return {
        "documents": make_artifact("rephrase", {"documents.jsonl.zst": documents(20)}),
        "heldout": make_artifact("ingest", {"heldout.jsonl.zst": documents(3, "a slow dog")}),
    }


@pytest.fixture
def run(store: Store, inputs: dict[str, Artifact], progress: Any) -> Callable[[], Outcome]:
    return lambda: execute("tokenize", CONFIG, inputs, store, progress)


def test_done_work_is_found_again(store: Store, run: Callable[[], Outcome], inputs: dict[str, Artifact]) -> None:
    assert lookup("tokenize", CONFIG, inputs, store) is None
    first, second = run(), run()
    assert (first.cached, second.cached) == (False, True)
    assert second.artifact.manifest == first.artifact.manifest
    assert dict(second.metrics) == dict(first.metrics)
    assert lookup("tokenize", CONFIG, inputs, store) is not None


def test_nothing_of_the_work_is_left(store: Store, run: Callable[[], Outcome]) -> None:
    key = run().artifact.key
    assert [info.name for info in store.list(f"work/{key}/")] == [f"work/{key}/lease.json"]


@pytest.mark.parametrize("damage", ["delete", "corrupt"])
def test_broken_work_is_made_anew_with_the_same_bytes(store: Store, run: Callable[[], Outcome], damage: str) -> None:
    first = run().artifact
    name = f"tokenize/{first.key}/{first.manifest.attempt}/train/web-00000.npy"
    if damage == "delete":
        store.delete(name)
    else:
        store.put(name, b"garbage")
    second = run()
    assert not second.cached
    assert second.artifact.digest == first.digest
    assert run().cached


def test_the_provenance_names_config_inputs_and_code(run: Callable[[], Outcome], inputs: dict[str, Artifact]) -> None:
    provenance = run().artifact.manifest.provenance
    assert provenance["inputs"] == {name: artifact.uri for name, artifact in inputs.items()}
    assert provenance["config"]["vocab_size"] == 512
    assert len(provenance["code"]) == 64


def test_missing_inputs_are_named(store: Store, progress: Any) -> None:
    with pytest.raises(StageError, match=r"takes the inputs \['documents', 'heldout'\], got \[\]"):
        execute("tokenize", CONFIG, {}, store, progress)


def test_a_stage_alone_says_what_must_run_first(store: Store) -> None:
    from k2.config.load import load_config

    with pytest.raises(UserError, match=r"corpus: not made yet .* run `k2 corpus --preset nano` first"):
        upstream(load_config("nano"), "tokenize", store, {"documents"})


def test_a_cache_hit_loads_neither_the_stage_nor_torch(run: Callable[[], Outcome], inputs: dict[str, Artifact]) -> None:
    run()
    code = """
import json, sys
from k2.cli import main
from k2.config.tokenize import TokenizeConfig
from k2.execution.runner import execute
from k2.store.artifacts import open_uri
from k2.store.client import Store
store = Store.from_environment()
inputs = {name: open_uri(store, uri) for name, uri in json.loads(sys.argv[1]).items()}
assert execute("tokenize", TokenizeConfig(vocab_size=512), inputs, store, None).cached
assert not {"torch", "tokenizers", "numpy", "k2.stages.tokenize"} & set(sys.modules)
"""
    uris = json.dumps({name: artifact.uri for name, artifact in inputs.items()})
    subprocess.run([sys.executable, "-c", code, uris], check=True)


def test_a_stage_of_one_process_refuses_several_before_it_looks_for_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(main, ["rl", "--preset", "nano"])
    assert result.exit_code == 2
    assert result.output == (
        "error: rl: torchrun started 2 ranks, but one process makes this stage; run `k2 rl` without torchrun"
        " (several ranks make pretrain)\n"
    )
