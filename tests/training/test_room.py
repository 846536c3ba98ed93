"""A layout that has no room in memory is refused before anything is built, with what fits instead."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k2.config.load import load_config
from k2.config.pretrain import PretrainConfig
from k2.errors import UserError
from k2.planner.layout import Layout, default_layout
from k2.planner.memory import stage_memory
from k2.training import pretraining, room
from k2.training.room import device_room, require_room

PRETRAIN = load_config("tiny").pretrain
LAYOUT = replace(default_layout(PRETRAIN), micro_batch_tokens=8 * PRETRAIN.context_length)


def needed(**changes: Any) -> float:
    return stage_memory(PRETRAIN, replace(LAYOUT, **changes), 0, "cpu").gpu


def test_what_fits_exactly_is_not_refused() -> None:
    require_room(PRETRAIN, LAYOUT, 0, "cpu", needed())


def test_a_smaller_micro_batch_is_named_first() -> None:
    half = LAYOUT.micro_batch_tokens // 2
    with pytest.raises(UserError, match=rf"{2 * half} tokens at once .*pretrain.micro_batch_tokens={half} fits"):
        require_room(PRETRAIN, LAYOUT, 0, "cpu", needed(micro_batch_tokens=half))


def test_then_what_else_keeps_less() -> None:
    with pytest.raises(UserError, match=r"pretrain.recompute=\[.*\] fits"):
        require_room(PRETRAIN, LAYOUT, 0, "cpu", needed(micro_batch_tokens=PRETRAIN.context_length) - 1)


def test_and_if_nothing_is_enough_more_ranks() -> None:
    with pytest.raises(UserError, match=r"has 1e-09 GB; no setting of activations is enough"):
        require_room(PRETRAIN, LAYOUT, 0, "cpu", 1.0)


def test_this_machine_has_room() -> None:
    device, free = device_room()
    assert device in ("cpu", "cuda")
    assert free > 1e8


def test_ranks_of_one_machine_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = device_room()[1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert device_room()[1] < alone / 100


def test_a_container_s_limit_holds_and_files_it_read_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text("50000000\n")
    (tmp_path / "memory.current").write_text("45000000\n")
    (tmp_path / "memory.stat").write_text("anon 5000000\nfile 40000000\ninactive_file 38000000\n")
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    assert device_room() == ("cpu", 43e6)


def test_pretraining_asks_before_it_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every context length: the long one needs more."""
    asked: list[tuple[int, int]] = []

    def note(config: PretrainConfig, layout: Layout, stage: int, *_: Any) -> None:
        asked.append((config.context_length, layout.micro_batch_tokens))

    monkeypatch.setattr(pretraining, "require_room", note)
    assert pretraining.join_ranks(PRETRAIN, {}) is None
    assert [context for context, _ in asked] == [PRETRAIN.context_length, PRETRAIN.long_context_length]
