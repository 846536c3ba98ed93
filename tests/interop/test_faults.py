"""Bad sources are named and leave nothing; a killed conversion continues; memory does not grow with the checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from k2.interop.digests import MANIFEST, digests, write_manifest
from tests.interop.helpers import k2, write_hf
from tests.quant.tiny import write_checkpoint

FIRST = "model-00001-of-00002.safetensors"
UP = "model.layers.1.mlp.experts.3.up_proj.weight"


def edit_tensors(folder: Path, change) -> None:
    """Change the tensors of the file that holds the name `change` starts with, and the index with them."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name, replacement = change
    file = index["weight_map"].get(name, FIRST)
    tensors = load_file(folder / file) | ({} if replacement is None else {name: replacement})
    index["weight_map"][name] = file
    if replacement is None:
        del tensors[name], index["weight_map"][name]
    save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | values).items() if v != "absent"}))


def refused(source: Path, out: Path, *message: str, command: tuple[str, ...] = ("import",)) -> None:
    """The command ends with 2, says all of `message`, and leaves nothing behind."""
    before = sorted(out.parent.iterdir())
    result = k2(command[0], source, out, *command[1:])
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    for text in message:
        assert text in result.stderr
    assert sorted(out.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("bf16", (UP, None), [f"tensor {UP}: expected in", "found nowhere; 1 missing"]),
        ("int4", (f"{UP}_scale", None), [f"tensor {UP}_scale: expected in", "found nowhere"]),
        ("int4", (f"{UP}_zero_point", torch.zeros(32, 2)), [f"tensor {UP}_zero_point in", FIRST, "unknown"]),
        ("bf16", ("model.extra.weight", torch.zeros(2)), ["tensor model.extra.weight in", FIRST, "1 unknown in all"]),
        ("bf16", (UP, torch.zeros(33, 64)), [UP, ".safetensors: expected shape [32, 64], found [33, 64]"]),
        ("fp8", (f"{UP}_scale_inv", torch.zeros(2, 3)), [f"{UP}_scale_inv", "expected shape [2, 2], found [2, 3]"]),
        ("int4", (f"{UP}_packed", torch.zeros(32, 8)), [f"{UP}_packed", "expected type I32, found F32"]),
        ("int4", (f"{UP}_shape", torch.tensor([64, 32])), [f"{UP}_shape", "the values [32, 64], found [64, 32]"]),
        ("bf16", (UP, torch.full((32, 64), torch.nan)), [f"tensor {UP}: expected finite values, found 2048 NaN"]),
        (
            "fp8",
            (f"{UP}_scale_inv", torch.full((2, 2), torch.inf)),
            [f"{UP}_scale_inv: expected finite values, found 4"],
        ),
    ],
)
def test_a_bad_tensor_is_named(tmp_path: Path, form: str, change, message: list[str]) -> None:
    write_hf(tmp_path / "hf", form)
    edit_tensors(tmp_path / "hf", change)
    refused(tmp_path / "hf", tmp_path / "out", *message)


@pytest.mark.parametrize(
    ("form", "values", "message"),
    [
        ("bf16", {"n_group": 3}, ["config.json", "n_group (3) must divide n_routed_experts (4)"]),
        ("bf16", {"qk_rope_head_dim": 7}, ["config.json: qk_rope_head_dim", "multiple of 2"]),
        ("bf16", {"hidden_size": "absent"}, ["config.json: hidden_size is missing"]),
        ("bf16", {"hidden_size": 65}, ["model.embed_tokens.weight", "expected shape [320, 65], found [320, 64]"]),
        ("bf16", {"scoring_func": "softmax"}, ["scoring_func is 'softmax', allowed is 'sigmoid'"]),
        ("bf16", {"num_key_value_heads": 1}, ["num_key_value_heads is 1, allowed is 2"]),
        ("bf16", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling type is 'linear'"]),
        ("bf16", {"rope_scaling": {"type": "yarn", "factor": 0.5}}, ["config.json: rope_scaling.factor"]),
        ("bf16", {"model_type": "llama"}, ["model_type is 'llama', allowed are deepseek_v3 and kimi_k2"]),
        ("fp8", {"quantization_config": {"quant_method": "fp8"}}, ["weight_block_size is None"]),
        ("fp8", {"quantization_config": {"quant_method": "awq"}}, ["quant_method is 'awq'"]),
        ("fp8", {"quantization_config": None}, ["_scale_inv in", "unknown to config.json's model; 48 "]),
    ],
)
def test_a_bad_config_is_named(tmp_path: Path, form: str, values, message: list[str]) -> None:
    write_hf(tmp_path / "hf", form)
    edit_config(tmp_path / "hf", **values)
    refused(tmp_path / "hf", tmp_path / "out", *message)


@pytest.mark.parametrize("size", [31, 7, -1, None])
def test_a_bad_group_size_is_named(tmp_path: Path, size: int | None) -> None:
    write_hf(tmp_path / "hf", "int4")
    quantization = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    quantization["config_groups"]["group_0"]["weights"]["group_size"] = size
    edit_config(tmp_path / "hf", quantization_config=quantization)
    refused(tmp_path / "hf", tmp_path / "out", f"group_size is {size}, allowed are multiples of 8")


def test_experts_that_do_not_divide_into_groups_are_named(tmp_path: Path) -> None:
    from k2.config.model import ModelConfig
    from k2.model import hf
    from k2.model.transformer import Transformer

    odd = ModelConfig(
        vocab_size=32, hidden_size=48, intermediate_size=48, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=1, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    hf.save(Transformer(odd).initialize(0), odd, tmp_path / "ours")
    message = "hidden_size is 48, allowed are multiples of the group, 32"
    refused(tmp_path / "ours", tmp_path / "out", message, command=("export", "--format", "int4"))


def test_a_truncated_file_is_named_with_its_sizes(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", "bf16")
    path = tmp_path / "hf" / FIRST
    size = path.stat().st_size
    os.truncate(path, size - 10)
    refused(tmp_path / "hf", tmp_path / "out", f"{path}: not a complete", f"expected {size} bytes, found {size - 10}")
    path.unlink()
    refused(tmp_path / "hf", tmp_path / "out", f"{path}: no such file")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("known_from", ["manifest", "download"])
def test_a_tampered_file_is_named_with_its_digests(tmp_path: Path, known_from: str) -> None:
    folder = tmp_path / "hf"
    write_hf(folder, "bf16")
    files = digests(folder, [path.name for path in folder.iterdir()])
    if known_from == "manifest":
        write_manifest(folder, {}, files)
    else:
        note = folder / ".cache" / "huggingface" / "download" / f"{FIRST}.metadata"
        note.parent.mkdir(parents=True)
        note.write_text(f"{'0' * 40}\n{files[FIRST].sha256}\n1700000000.0\n")
    assert k2("import", folder, tmp_path / "good").exit_code == 0
    flip(folder / FIRST)
    found = digests(folder, [FIRST])[FIRST].sha256
    refused(folder, tmp_path / "out", f"{folder / FIRST}: expected sha256 {files[FIRST].sha256}, found {found}")


def test_a_file_that_the_manifest_lists_must_be_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ours")
    assert k2("export", tmp_path / "ours", tmp_path / "hf").exit_code == 0
    (tmp_path / "hf" / "generation_config.json").unlink()
    refused(tmp_path / "hf", tmp_path / "out", "generation_config.json: no such file, but manifest.json lists it")


def test_no_folder_no_config_no_weights(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", tmp_path / "out", f"{tmp_path / 'nothing'}: no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", f"{tmp_path / 'empty'}: no config.json there")
    write_hf(tmp_path / "hf", "bf16")
    for path in (tmp_path / "hf").glob("model*"):
        path.unlink()
    refused(tmp_path / "hf", tmp_path / "out", f"{tmp_path / 'hf'}: no .safetensors file there")


def start(*arguments: object) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "k2.cli", *map(str, arguments)], stderr=subprocess.DEVNULL)


def finished_files(out: Path) -> dict[str, int]:
    """Inode of each file the journal calls finished."""
    journal = out.with_name(f".{out.name}.journal")
    lines = journal.read_text().split("\n")[1:-1] if journal.exists() else []
    names = [json.loads(line)["file"] for line in lines]
    return {name: (out.with_name(f".{out.name}.partial") / name).stat().st_ino for name in names}


def test_a_killed_export_continues_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ours")
    options = ("--format", "int4", "--set", "export.shard_bytes=2000")
    assert k2("export", tmp_path / "ours", tmp_path / "straight", *options).exit_code == 0
    out = tmp_path / "killed"
    process = start("export", tmp_path / "ours", out, *options)
    while len(finished_files(out)) < 5:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    before = finished_files(out)
    with (tmp_path / ".killed.journal").open("a") as journal:
        journal.write('{"file": "torn')
    flip(tmp_path / ".killed.partial" / sorted(before)[0])  # a finished file that rotted meanwhile is made anew
    assert k2("export", tmp_path / "ours", out, *options).exit_code == 0
    after = {name: (out / name).stat().st_ino for name in before}
    assert [name for name in before if before[name] != after[name]] == sorted(before)[:1]
    files = {name: (tmp_path / "straight" / name).read_bytes() for name in os.listdir(tmp_path / "straight")}
    assert files == {name: (out / name).read_bytes() for name in os.listdir(out)}
    assert MANIFEST in files
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_a_killed_run_left_is_dropped_when_the_source_changed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ours")
    (tmp_path / ".hf.partial").mkdir()
    (tmp_path / ".hf.partial" / "model.safetensors").write_bytes(b"old")
    (tmp_path / ".hf.partial" / "stale").write_bytes(b"old")
    (tmp_path / ".hf.journal").write_text('{"source": "another"}\n')
    assert k2("export", tmp_path / "ours", tmp_path / "hf").exit_code == 0
    assert not (tmp_path / "hf" / "stale").exists()


MEMORY = """
import re, sys
from pathlib import Path
import k2.interop.convert
from k2.cli import main
from k2.model.tensor_files import CheckpointTensors

def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
before = memory("VmRSS")
if sys.argv[1] == "whole":
    dict(CheckpointTensors(Path(sys.argv[2]) / "model"))
else:
    main(sys.argv[1:], standalone_mode=False)
print(memory("VmHWM") - before)
"""


def peak_bytes(*arguments: object) -> int:
    """How far the process's memory rose above what it was before the command."""
    command = [sys.executable, "-c", MEMORY, *map(str, arguments)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[-2])


@pytest.mark.parametrize("form", ["fp32", "int4"])
def test_memory_holds_a_few_tensors_not_the_checkpoint(tmp_path: Path, form: str, big_checkpoint: Path) -> None:
    """215 MB of weights in matrices of 1.6 MB pass through less than a fifth of it."""
    total = sum(path.stat().st_size for path in (big_checkpoint / "model").iterdir())
    peak = peak_bytes("export", big_checkpoint, tmp_path / "hf", "--format", form)
    print(f"{form}: peak {peak / 1e6:.0f} MB above the start, checkpoint {total / 1e6:.0f} MB")
    assert total > 200e6
    assert peak < total / 5


def test_the_measure_of_memory_sees_a_whole_checkpoint(big_checkpoint: Path) -> None:
    assert peak_bytes("whole", big_checkpoint) > 200e6


@pytest.fixture(scope="module")
def big_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from k2.config.model import ModelConfig
    from k2.model import hf
    from k2.model.transformer import Transformer

    config = ModelConfig(vocab_size=512, hidden_size=640, intermediate_size=640, moe_intermediate_size=640,
                         num_hidden_layers=3, num_attention_heads=2, q_lora_rank=32, kv_lora_rank=32,
                         qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=20,
                         num_experts_per_tok=2)  # fmt: skip
    folder = tmp_path_factory.mktemp("big")
    hf.save(Transformer(config).initialize(0), config, folder)
    return folder
