"""Executes tool calls against a world that keeps its state, and makes some of them fail the way services do.

Three faults are injected by seed: `error` (the service refuses for now) and `timeout` leave the world untouched;
`partial` does the work and loses the confirmation, or returns half of a list. An agent sees only the answer.
"""

import random
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, Protocol

from jsonschema import Draft202012Validator

from k2.agentic.goals import semantics
from k2.agentic.operations import State, ToolFailure, execute
from k2.agentic.tasks import Task
from k2.agentic.tools import ToolSpec
from k2.config.synthesize import FaultRates
from k2.serving.chat_template import compact_json
from k2.serving.tool_calls import loads_object

Fault = Literal["error", "timeout", "partial"]

FAULT_TEXT: dict[Fault, str] = {
    "error": "service unavailable, try again",
    "timeout": "timeout, try again",
    "partial": "connection lost, result unknown",
}


class World(Protocol):
    """Something that tools act on."""

    def call(self, tool: str, arguments: Mapping[str, Any]) -> str:
        """Execute a call and return its result. Raises ToolFailure when the service refuses; nothing changed then."""

    def state(self) -> dict[str, Any]:
        """The state as nested JSON, for the rubric."""


class SimulatedWorld:
    """A synthetic domain: the operational semantics of its tools over a state."""

    def __init__(self, task: Task) -> None:
        self._operations = {tool.name: semantics(tool) for tool in task.agent.tools}
        self._state: State = deepcopy(task.initial)

    def call(self, tool: str, arguments: Mapping[str, Any]) -> str:
        """See World."""
        trial = deepcopy(self._state)
        result = execute(self._operations[tool], arguments, trial)
        self._state = trial
        return compact_json(result)

    def state(self) -> dict[str, Any]:
        """See World."""
        return self._state


class Simulator:
    """Answers the calls of one episode; `faults` lists what was injected, for reports and never for the judge."""

    def __init__(self, world: World, tools: Sequence[ToolSpec], rates: FaultRates, seed: str) -> None:
        self.world = world
        self.faults: list[Fault] = []
        self._tools = {tool.name: tool for tool in tools}
        self._validators = {tool.name: Draft202012Validator(tool.parameters) for tool in tools}
        self._rates = rates
        self._rng = random.Random(f"faults/{seed}")

    def answer(self, call: Mapping[str, Any]) -> str:
        """The text of the tool's message: a result, or JSON with `error`. Never raises for what the agent wrote."""
        try:
            return self._answer(call)
        except ToolFailure as failure:
            return compact_json({"error": str(failure)})

    def _answer(self, call: Mapping[str, Any]) -> str:
        name = call["function"]["name"]
        if "error" in call:
            raise ToolFailure(call["error"])
        if name not in self._tools:
            raise ToolFailure(f"no tool {name}")
        arguments = self._arguments(name, call["function"]["arguments"])
        fault = self._draw(self._tools[name])
        if fault in ("error", "timeout"):
            raise ToolFailure(FAULT_TEXT[fault])
        result = self.world.call(name, arguments)
        if fault != "partial":
            return result
        if self._tools[name].operation is not None and semantics(self._tools[name]).kind == "find":
            ids = loads_object(result)["ids"]
            return compact_json({"ids": list(ids)[: len(list(ids)) // 2], "more": True})  # type: ignore[call-overload]
        raise ToolFailure(FAULT_TEXT[fault])

    def _arguments(self, name: str, text: str) -> dict[str, Any]:
        try:
            arguments = loads_object(text)
        except ValueError as error:
            raise ToolFailure(f"bad arguments: {error}") from error
        problem = next(iter(sorted(self._validators[name].iter_errors(arguments), key=str)), None)
        if problem:
            raise ToolFailure(f"bad arguments: {problem.message}")
        return arguments

    def _draw(self, tool: ToolSpec) -> Fault | None:
        draw = self._rng.random()
        fault: Fault | None = None
        if draw < self._rates.error:
            fault = "error"
        elif draw < self._rates.error + self._rates.timeout:
            fault = "timeout"
        elif draw < self._rates.error + self._rates.timeout + self._rates.partial and self._can_check(tool):
            fault = "partial"
        self.faults += [fault] if fault else []
        return fault

    def _can_check(self, tool: ToolSpec) -> bool:
        """Whether the agent has a tool to find out what a lost answer left behind."""
        if tool.operation is None:
            return False
        kinds = {semantics(other).kind for other in self._tools.values()}
        return tool.operation.kind == "find" or (not tool.operation.reads_only and "get" in kinds)
