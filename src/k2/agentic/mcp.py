"""Real MCP servers as child processes over stdio, with blocking calls and without any network.

The servers are packages of the same environment. They end with the context manager, and by end of file on their
standard input when this process is killed.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from anyio.from_thread import BlockingPortal, start_blocking_portal
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.stdio import stdio_client

from k2.agentic.operations import ToolFailure
from k2.agentic.tools import ToolSpec
from k2.errors import StageError

COMMANDS = {
    "git": ("mcp_server_git", "--repository", "."),
    "time": ("mcp_server_time", "--local-timezone", "UTC"),
}
CATEGORIES = {"git": "software applications", "time": "device systems"}

# Fixed identity and dates (6 January 2025): commit hashes must not depend on who runs this, or when.
GIT_ENVIRONMENT = {
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.org",
    "GIT_AUTHOR_DATE": "1736154000 +0000",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.org",
    "GIT_COMMITTER_DATE": "1736154000 +0000",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "LC_ALL": "C",
}


@dataclass
class McpServer:
    """A running server: its tools and blocking calls. `directory` is its working directory."""

    name: str
    directory: Path
    client: Client
    portal: BlockingPortal
    serial: Iterator[int] = field(default_factory=count)

    def tools(self, *, terse: bool) -> list[ToolSpec]:
        """The tools the server lists; `terse` keeps required and numeric parameters and drops the prose on them."""
        listed = self.portal.call(self.client.list_tools).tools
        return [
            ToolSpec(
                name=tool.name,
                description=tool.description or "",
                parameters=_terse(tool.input_schema) if terse else dict(tool.input_schema),
                world=f"mcp:{self.name}",
                category=CATEGORIES[self.name],
            )
            for tool in sorted(listed, key=lambda tool: tool.name)
        ]

    def call(self, tool: str, arguments: Mapping[str, Any]) -> str:
        """Call a tool. Raises ToolFailure when the tool reports an error, StageError when nothing answers."""
        try:
            result = self.portal.call(self.client.call_tool, tool, dict(arguments))
        except MCPError as error:
            raise StageError(f"MCP server {self.name} did not answer {tool}: {error}") from error
        text = "\n".join(part.text for part in result.content if part.type == "text")
        if result.is_error:
            raise ToolFailure(text.removeprefix(f"Error executing tool {tool}: "))
        return text


@contextmanager
def running_servers(names: Sequence[str], scratch: Path, timeout_s: float) -> Iterator[dict[str, McpServer]]:
    """Start servers side by side, each in a directory of its own under `scratch`; stop all of them at the end.

    Raises StageError when one does not start, with the end of what it wrote to its standard error.
    """
    with start_blocking_portal() as portal:
        stack = ExitStack()
        try:
            with ThreadPoolExecutor() as pool:
                started = pool.map(lambda name: _start(name, scratch, timeout_s, portal, stack), names)
                servers = {server.name: server for server in started}
            yield servers
        finally:
            # Closed without the exception that ends the block: the clients would wrap it into an exception group.
            stack.close()


def git(directory: Path, *arguments: str, stdin: str = "") -> str:
    """Run git with fixed identity and dates and return what it prints. Raises CalledProcessError."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), **GIT_ENVIRONMENT}
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=directory, input=stdin, env=environment, check=True, capture_output=True, text=True
    ).stdout


def _start(name: str, scratch: Path, timeout_s: float, portal: BlockingPortal, stack: ExitStack) -> McpServer:
    directory = scratch / name
    directory.mkdir(parents=True)
    if name == "git":
        git(directory, "init", "--quiet")  # the server is confined to this repository and what lies below it
    log = stack.enter_context((scratch / f"{name}.log").open("w+"))
    module, *arguments = COMMANDS[name]
    parameters = StdioServerParameters(
        command=sys.executable, args=["-m", module, *arguments], cwd=directory, env=GIT_ENVIRONMENT
    )
    client = Client(stdio_client(parameters, errlog=log), read_timeout_seconds=timeout_s)
    try:
        connected = stack.enter_context(portal.wrap_async_context_manager(client))
    except (MCPError, OSError, BaseExceptionGroup) as error:
        log.seek(0)
        raise StageError(f"MCP server {name} did not start: {log.read()[-500:] or error}") from error
    return McpServer(name, directory, connected, portal)


def _terse(schema: Mapping[str, Any]) -> dict[str, Any]:
    required = schema.get("required", [])
    properties = {
        name: {key: value for key, value in spec.items() if key in ("type", "items", "enum")}
        for name, spec in schema["properties"].items()
        if name in required or spec.get("type") == "integer"
    }
    return {"type": "object", "properties": properties, "required": required}
