"""README and docs name commands, options, files and variables that exist."""

import re
import shlex
from pathlib import Path

import click
import pytest

from k2.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Lines that start with `$ ` in fenced `console` blocks, with the lines that continue them."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text().replace("\\\n", ""), re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


COMMANDS = sorted({(page.name, command) for page in PAGES for command in commands(page)})


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_documented_commands_parse(page: str, command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^([a-z0-9-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
        return
    if program == "torchrun":
        arguments = arguments[arguments.index("k2.cli") + 1 :]
    else:
        assert program.endswith("k2"), command
    group: click.Command = main
    context = click.Context(main)
    while isinstance(group, click.Group):
        name, group, arguments = group.resolve_command(context, arguments)
        assert group is not None, name
    group.make_context(group.name, list(arguments), parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def all_commands(group: click.Group, path: str = "k2") -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    for name, command in group.commands.items():
        found.append((f"{path} {name}", command))
        if isinstance(command, click.Group):
            found += all_commands(command, f"{path} {name}")
    return found


@pytest.mark.parametrize(
    ("name", "command"), all_commands(main), ids=lambda value: str(value) if isinstance(value, str) else ""
)
def test_every_command_explains_itself(name: str, command: click.Command) -> None:
    assert command.help, name
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.name}"
