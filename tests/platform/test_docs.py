"""The page about pipelines names every field and shows YAML that is valid."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from k2.config.base import Section
from k2.config.deployment import Deployment, Placement
from k2.platform.documents import _section_types
from k2.platform.render import PIPELINES
from k2.platform.schedule_file import Schedules

PAGE = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
ON_SERVERS = {"time_zone", "concurrency_policy", "schedules"}


def sections(kind: type[Section]) -> Iterator[type[Section]]:
    yield kind
    for field in kind.model_fields.values():
        for inner in _section_types(field.annotation):
            yield from sections(inner)


FIELDS = {name for kind in (*sections(Deployment), *sections(Schedules)) for name in kind.model_fields} - ON_SERVERS


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_every_field_is_explained(field: str) -> None:
    assert re.search(rf"[`{{ ]{field}[`}}, :]", PAGE), field


def test_every_pipeline_is_named() -> None:
    for name in PIPELINES:
        assert name in PAGE or name.startswith("ablation-"), name


def test_every_field_says_what_it_is() -> None:
    for kind in (Deployment, Schedules, Placement):
        for section in sections(kind):
            for name, field in section.model_fields.items():
                assert field.description, f"{section.__name__}.{name}"


def test_the_cronjob_is_a_valid_document() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    job = yaml.safe_load(block)
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][:3] == ["k2", "pipeline", "submit"]
