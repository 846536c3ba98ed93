"""`k2 import` and `k2 export`: every format, outside readers, repetition, and who may write where."""

import fcntl
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from k2.interop.digests import MANIFEST, verified
from k2.interop.source import LogicalTensors
from k2.model import hf
from k2.model.tensor_files import CheckpointTensors
from k2.quant.checkpoint import load_int4
from k2.store.artifacts import open_uri
from tests.interop.helpers import k2, loaded, logical_state, write_hf
from tests.quant.tiny import TINY, model, prompts, tokenizer, write_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("form", "kept"), [("fp32", "F32"), ("bf16", "BF16"), ("fp8", "BF16"), ("int4", "BF16")])
def test_import_gives_the_weights_that_the_format_describes(tmp_path: Path, form: str, kept: str) -> None:
    expected = write_hf(tmp_path / "hf", form)
    result = k2("import", tmp_path / "hf", tmp_path / "ours", "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert (made["format"], made["tensors"]) == ({"F32": "fp32", "BF16": "bf16"}[kept], len(expected))
    ours = loaded(tmp_path / "ours")
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    assert CheckpointTensors(tmp_path / "ours" / "model").stored["lm_head.weight"].dtype == kept


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_import_to_float32_keeps_every_bit(tmp_path: Path, form: str) -> None:
    expected = write_hf(tmp_path / "hf", form)
    assert k2("import", tmp_path / "hf", tmp_path / "ours", "--format", "fp32").exit_code == 0
    ours = loaded(tmp_path / "ours")
    assert all(
        torch.equal(ours[name].bfloat16(), value.bfloat16()) for name, value in expected.items() if value.ndim > 1
    )


@pytest.mark.parametrize("form", ["bf16", "fp32", "int4"])
def test_transformers_loads_an_export_as_it_is(tmp_path: Path, checkpoint: Path, form: str) -> None:
    assert k2("export", checkpoint, tmp_path / "hf", "--format", form).exit_code == 0
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == (torch.float32 if form == "fp32" else torch.bfloat16)
    ours = load_int4(tmp_path / "hf")
    with torch.no_grad():
        theirs(prompts())  # packed weights are dequantised by the first pass
        torch.nn.Module.float(theirs)
        torch.testing.assert_close(theirs(prompts()).logits, ours.logits(ours(prompts())[0]), rtol=1e-4, atol=2e-5)
    reader = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert reader.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).startswith("<|im_user|>")
    ids = GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id
    assert ids == [tokenizer().special["<|im_end|>"], tokenizer().special["[EOS]"]]


def test_there_and_back_gives_the_same_weights_and_files(tmp_path: Path, checkpoint: Path) -> None:
    for step in (
        ("export", checkpoint, tmp_path / "hf", "--format", "fp32"),
        ("import", tmp_path / "hf", tmp_path / "ours"),
        ("export", tmp_path / "ours", tmp_path / "again", "--format", "fp32"),
    ):
        assert k2(*step).exit_code == 0
    ours = loaded(tmp_path / "ours")
    assert all(torch.equal(ours[name], value) for name, value in logical_state().items())
    first, second = content(tmp_path / "hf"), content(tmp_path / "again")
    assert first.pop(MANIFEST) != second.pop(MANIFEST)  # they name different sources
    assert first == second


def test_config_of_every_reader(tmp_path: Path, checkpoint: Path) -> None:
    """What vLLM and SGLang choose model class, precision and quantisation by."""
    assert k2("export", checkpoint, tmp_path / "hf", "--format", "int4").exit_code == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["model_type"] == "deepseek_v3"
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["eos_token_id"][0] == tokenizer().special["<|im_end|>"]


def test_a_published_folder_verifies_and_repeats(tmp_path: Path, checkpoint: Path) -> None:
    for name in "ab":
        options = ("--format", "int4", "--set", "export.shard_bytes=40000")
        assert k2("export", checkpoint, tmp_path / name, *options).exit_code == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")
    listed = json.loads((tmp_path / "a" / MANIFEST).read_text())["files"]
    assert set(listed) == set(content(tmp_path / "a")) - {MANIFEST}
    assert len(listed) > 10
    verified(tmp_path / "a", [])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_finished_work_is_not_done_again_and_other_work_does_not_replace_it(tmp_path: Path, checkpoint: Path) -> None:
    assert k2("export", checkpoint, tmp_path / "hf").exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "hf").iterdir()}
    assert k2("export", checkpoint, tmp_path / "hf").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "hf").iterdir()} == before
    other = k2("export", checkpoint, tmp_path / "hf", "--format", "fp32")
    assert (other.exit_code, "exists and is not empty" in other.stderr) == (2, True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "hf").iterdir()} == before


def test_damaged_finished_work_is_named(tmp_path: Path, checkpoint: Path) -> None:
    assert k2("export", checkpoint, tmp_path / "hf").exit_code == 0
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    result = k2("export", checkpoint, tmp_path / "hf")
    assert result.exit_code == 2
    assert f"{weights}: expected sha256" in result.stderr


def test_one_writer_at_a_time(tmp_path: Path, checkpoint: Path) -> None:
    with (tmp_path / ".hf.journal").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        result = k2("export", checkpoint, tmp_path / "hf")
    assert (result.exit_code, "another process is writing it" in result.stderr) == (2, True)


def test_what_an_imported_folder_says_about_chat_is_kept(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", "bf16")
    tokenizer().save(tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ 'their own' }}")
    (tmp_path / "hf" / "generation_config.json").write_text('{"temperature": 0.25}')
    assert k2("import", tmp_path / "hf", tmp_path / "ours").exit_code == 0
    assert k2("export", tmp_path / "ours", tmp_path / "again").exit_code == 0
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_a_pipeline_artifact_is_exported_by_its_uri(tmp_path: Path, make_artifact) -> None:
    artifact = make_artifact("rl", write_checkpoint(tmp_path / "rl"))
    assert k2("export", artifact.uri, tmp_path / "hf", "--format", "fp32").exit_code == 0
    read = hf.load(tmp_path / "hf").state_dict()
    assert all(torch.equal(read[name], value) for name, value in model().state_dict().items())
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_an_import_is_published_once_for_stages_to_start_from(tmp_path: Path, store) -> None:
    write_hf(tmp_path / "hf", "int4")
    tokenizer().save(tmp_path / "hf")
    uris = []
    for out in ("one", "two"):
        result = k2("import", tmp_path / "hf", tmp_path / out, "--publish", "--json")
        uris.append(json.loads(result.stdout)["artifact"])
    assert uris[0] == uris[1]
    artifact = open_uri(store, uris[0])
    assert artifact.files == sorted(content(tmp_path / "one"))
    assert torch.equal(
        hf.load(artifact.directory()).state_dict()["lm_head.weight"], loaded(tmp_path / "one")["lm_head.weight"]
    )
    assert k2("export", uris[0], tmp_path / "again", "--format", "int4").exit_code == 0
    read, expected = (LogicalTensors(tmp_path / name) for name in ("again", "hf"))
    assert all(torch.equal(read[name], expected[name]) for name in read if ".experts." not in name)


def test_predictions_layers_and_stored_frequencies_are_counted_not_kept(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write_hf(tmp_path / "hf", "bf16")
    extra = {
        f"model.layers.{TINY.num_hidden_layers}.eh_proj.weight": torch.zeros(2, 2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    save_file(extra, tmp_path / "hf" / "extra.safetensors")
    index = json.loads((tmp_path / "hf" / hf.INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    (tmp_path / "hf" / hf.INDEX).write_text(json.dumps(index))
    made = json.loads(k2("import", tmp_path / "hf", tmp_path / "ours", "--json").stdout)
    assert made["ignored"] == 2
    assert not set(extra) & set(CheckpointTensors(tmp_path / "ours" / "model"))


def test_export_without_folders_is_the_pipelines_stage(tmp_path: Path) -> None:
    result = k2("export", "--input", "nothing=s3://x")
    assert (result.exit_code, "--input nothing: export takes" in result.stderr) == (2, True)
    assert "name the folder to write" in k2("export", tmp_path).stderr
