"""What is asked of a machine before images are built on it."""

import re

import pytest

from tests.e2e_containers import able


def test_too_little_disk_is_said_before_anything_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(able, "FREE_BYTES", 10**18)
    monkeypatch.setattr(able, "install", lambda: pytest.fail("installs tools"))
    assert re.fullmatch(r"1000000000 GB of free disk: /\S+ has \d+\.\d", able.missing())
