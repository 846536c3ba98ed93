"""One tool of the repository, wherever it comes from."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from k2.agentic.operations import Operation


class ToolSpec(BaseModel):
    """Interface, description and, for synthetic tools, operational semantics.

    `world` names where the tool lives: `mcp:<server>` for a real server, `evolved:<domain>` for a synthetic domain.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    description: str
    parameters: dict[str, Any]
    world: str
    category: str
    operation: Operation | None = None

    def declaration(self) -> dict[str, Any]:
        """The tool as OpenAI-style declarations spell it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}
