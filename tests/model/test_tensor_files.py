"""Safetensors files: bytes against the library, sizes of published models, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from k2.config.model import ModelConfig
from k2.errors import UserError
from k2.model.layout import logical_tensors
from k2.model.storage import INDEX, StoredTensor, cut, header, index, stored, weight_bytes
from k2.model.tensor_files import DTYPES, CheckpointTensors, read_header, write_file

SPECS = st.dictionaries(
    st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=9).filter(lambda n: n != "__metadata__"),
    st.tuples(
        st.sampled_from(sorted(DTYPES.keys() - {"U32"})), st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)
    ),
    min_size=1,
    max_size=6,
)


def zeros(spec: StoredTensor) -> torch.Tensor:
    return torch.zeros(spec.shape, dtype=torch.float32).to(DTYPES[spec.dtype])


@settings(max_examples=60, deadline=None)
@given(SPECS)
def test_bytes_are_those_of_the_library(tmp_path_factory, specs) -> None:
    folder = tmp_path_factory.mktemp("files")
    described = [StoredTensor(name, dtype, shape) for name, (dtype, shape) in specs.items()]
    values = {spec.name: zeros(spec) for spec in described}
    for value in values.values():
        if value.dtype == torch.float32:
            value.copy_(torch.arange(value.numel()).view(value.shape))
    write_file(folder / "ours.safetensors", described, values.values())
    save_file(values, folder / "library.safetensors", metadata={"format": "pt"})
    assert (folder / "ours.safetensors").read_bytes() == (folder / "library.safetensors").read_bytes()


def test_tensors_are_read_as_written(tmp_path: Path) -> None:
    values = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.tensor([1, -2], dtype=torch.int32)}
    save_file(values, tmp_path / "x.safetensors")
    read = CheckpointTensors(tmp_path)
    assert list(read) == ["a", "b", "c"]
    assert all(torch.equal(read[name], value) for name, value in values.items())


@pytest.mark.parametrize(("form", "gigabytes"), [("fp8", 1029.17), ("int4", 594.206)])
def test_sizes_are_those_of_the_released_models(form, gigabytes) -> None:
    """k2-facts 1.7: Kimi K2 Instruct takes 1029.2 GB in FP8, K2 Thinking 594.2 GB in INT4."""
    assert weight_bytes(logical_tensors(ModelConfig()), form) / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_files_hold_every_tensor_once_and_are_as_large_as_asked() -> None:
    config = ModelConfig(num_hidden_layers=2, n_routed_experts=8)
    layout, limit = logical_tensors(config), 600_000_000
    shards = cut(layout, "int4", limit)
    assert [t for shard in shards for t in shard.tensors] == layout
    assert index(shards)["metadata"]["total_size"] == weight_bytes(layout, "int4")
    sizes = [sum(part.bytes for part in shard.stored) for shard in shards]
    assert all(size <= limit or len(shard.tensors) == 1 for size, shard in zip(sizes, shards, strict=True))
    following = [weight_bytes(shard.tensors[:1], "int4") for shard in shards[1:]]
    assert all(size + first > limit for size, first in zip(sizes, following, strict=False))


def test_every_stored_tensor_is_aligned() -> None:
    config = ModelConfig(vocab_size=9, hidden_size=64, num_hidden_layers=2, n_routed_experts=9, num_attention_heads=1)
    for form in ("fp32", "bf16", "int4", "fp8"):
        parts = [part for t in logical_tensors(config) for part in stored(t, form)]
        head, positions = header(parts)
        assert len(head) % 8 == 0
        assert all(positions[part.name] % DTYPES[part.dtype].itemsize == 0 for part in parts)


def rewrite_header(path: Path, change) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def damage(path: Path, kind: str) -> None:
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "short":
        path.write_bytes(path.read_bytes()[:-5])
    elif kind == "long":
        path.write_bytes(path.read_bytes() + b"x")
    elif kind == "header length":
        path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])
    elif kind == "header":
        path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F32,', 1))
    elif kind == "type":
        rewrite_header(path, lambda entries: entries["a"].update(dtype="C64"))
    elif kind == "extent":
        rewrite_header(path, lambda entries: entries["a"].update(shape=[4, 5]))
    elif kind == "overlap":
        rewrite_header(path, lambda entries: entries["b"].update(data_offsets=[0, 60]))
    elif kind == "not finite":
        save_file({"a": torch.tensor([1.0, float("nan"), float("-inf")])}, path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "not a complete safetensors file: a header of 0 bytes in a file of 0"),
        ("short", r"not a complete safetensors file: expected (\d+) bytes, found \d+"),
        ("long", r"not a complete safetensors file: expected (\d+) bytes, found \d+"),
        ("header length", "a header of 1152921504606846976 bytes"),
        ("header", "its header cannot be read"),
        ("type", "tensor a: type is C64, allowed are I64"),
        ("extent", r"tensor a: \[4, 5\] takes 80 bytes, found 60"),
        ("overlap", "its tensors overlap or leave gaps"),
        ("not finite", r"tensor a: expected finite values, found 2 NaN or infinite in .*x\.safetensors"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3, 5), "b": torch.ones(3, 5)}, path)
    damage(path, kind)
    with pytest.raises(UserError, match=message) as error:
        dict(CheckpointTensors(tmp_path))
    assert str(path) in str(error.value)


def test_a_nan_in_fp8_is_found(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="tensor a: expected finite values, found 1 NaN"):
        CheckpointTensors(tmp_path)["a"]


def test_a_file_that_shrinks_while_it_is_open_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(300, 500)}, path)
    tensors = CheckpointTensors(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="tensor a: expected 600000 bytes, found"):
        tensors["a"]


@pytest.mark.parametrize(
    ("index_text", "message"),
    [
        ('{"weight_map": {"a": "gone.safetensors"}}', r"gone\.safetensors: no such file"),
        ('{"weight_map": {"c": "x.safetensors"}}', "tensor c: .* says it is in .*x.safetensors, it is not"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside its folder"),
        ("{", "not an index"),
        ("[]", "not an index"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, index_text: str, message: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / INDEX).write_text(index_text)
    with pytest.raises(UserError, match=message):
        CheckpointTensors(tmp_path)


def test_the_index_says_which_files_belong_to_the_checkpoint(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "old.safetensors")
    with pytest.raises(UserError, match=re.escape("tensor a: both in")):
        CheckpointTensors(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "x.safetensors"}}')
    assert CheckpointTensors(tmp_path)["a"] == 1


def test_the_library_reads_our_files(tmp_path: Path) -> None:
    write_file(tmp_path / "x.safetensors", [StoredTensor("a", "BF16", (3,))], [torch.arange(3).bfloat16()])
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2]
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert list(read_header(tmp_path / "x.safetensors")) == ["a"]
