"""What a synthetic tool does: operational semantics as data, over a state `{entity: {id: record}}`.

An operation is a value, not code, so evolution can mutate it, a file can hold it, and one interpreter executes all of
them. Failures a real service would answer with are `ToolFailure`; the state is then left as it was by the caller.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Kind = Literal["get", "find", "create", "remove", "set", "adjust", "move", "verb", "total"]
Record = dict[str, Any]
State = dict[str, dict[str, Record]]
Arguments = Mapping[str, Any]

READING: frozenset[str] = frozenset({"get", "find", "total"})


class ToolFailure(Exception):
    """The service refuses the call; the message is what the agent sees."""


class Operation(BaseModel):
    """One operation on records of `entity`.

    `field` is the field it reads or writes, `values` the allowed values (`set`, `find`) or the status before and after
    (`verb`), `sign` the direction of `adjust`, `low` and `high` the bounds of the quantity, `limit` the most that one
    call may move, `guard` the status a record must have, `template` the record that `create` makes, and `then` a second
    operation on the same record in the same call.
    """

    model_config = ConfigDict(frozen=True)

    kind: Kind
    entity: str
    field: str = ""
    values: tuple[str, ...] = ()
    sign: int = 1
    low: int = 0
    high: int = 0
    limit: int | None = None
    guard: str | None = None
    template: dict[str, Any] = {}
    then: "Operation | None" = None

    @property
    def reads_only(self) -> bool:
        """Whether no call of it can change the state."""
        return self.kind in READING


def execute(operation: Operation, arguments: Arguments, state: State) -> Record:
    """Apply one call to `state` in place and return its result. Raises ToolFailure; `state` is then half-changed."""
    result = _EFFECTS[operation.kind](operation, arguments, state)
    if operation.then:
        result = result | execute(operation.then, arguments, state)
    return result


def parameters(operation: Operation) -> Record:
    """JSON schema of the arguments."""
    properties: Record = dict(_PROPERTIES[operation.kind](operation))
    if operation.then:
        properties |= parameters(operation.then)["properties"]
    return {"type": "object", "properties": properties, "required": sorted(properties)}


def sample_arguments(operation: Operation, state: State, rng: random.Random) -> dict[str, Any] | None:
    """Arguments for a call that would succeed now, or None when a few attempts found none."""
    for _ in range(8):
        arguments = {
            name: _sample_value(operation, name, schema, state, rng)
            for name, schema in sorted(parameters(operation)["properties"].items())
        }
        trial = {entity: {i: dict(r) for i, r in records.items()} for entity, records in state.items()}
        try:
            execute(operation, arguments, trial)
        except ToolFailure:
            continue
        if operation.reads_only or trial != state:
            return arguments
    return None


def new_id(entity: str, rng: random.Random) -> str:
    """A short record name such as `a47`."""
    return f"{entity[0]}{rng.randrange(1, 100)}"


def _sample_value(operation: Operation, name: str, schema: Record, state: State, rng: random.Random) -> Any:
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if schema["type"] == "integer":
        return rng.randint(1, max(1, min(operation.limit or 60, (operation.high - operation.low) // 2)))
    if operation.kind == "create" and name == "id":
        return new_id(operation.entity, rng)
    return rng.choice(sorted(state[operation.entity]))


def _record(operation: Operation, record_id: str, state: State) -> Record:
    record = state[operation.entity].get(record_id)
    if record is None:
        raise ToolFailure(f"no {operation.entity} {record_id}")
    if operation.guard and record["status"] != operation.guard:
        raise ToolFailure(f"{record_id} is {record['status']}, not {operation.guard}")
    return record


def _get(operation: Operation, arguments: Arguments, state: State) -> Record:
    return {"id": arguments["id"], **_record(operation, arguments["id"], state)}


def _find(operation: Operation, arguments: Arguments, state: State) -> Record:
    records = state[operation.entity]
    return {"ids": sorted(i for i, r in records.items() if r[operation.field] == arguments[operation.field])}


def _create(operation: Operation, arguments: Arguments, state: State) -> Record:
    if arguments["id"] in state[operation.entity]:
        raise ToolFailure(f"{operation.entity} {arguments['id']} exists already")
    record = operation.template | {name: arguments[name] for name in arguments if name in operation.template}
    state[operation.entity][arguments["id"]] = record
    return {"id": arguments["id"], "status": record["status"]}


def _remove(operation: Operation, arguments: Arguments, state: State) -> Record:
    _record(operation, arguments["id"], state)
    del state[operation.entity][arguments["id"]]
    return {"id": arguments["id"], "removed": True}


def _set(operation: Operation, arguments: Arguments, state: State) -> Record:
    record = _record(operation, arguments["id"], state)
    record[operation.field] = arguments[operation.field]
    return {"id": arguments["id"], operation.field: record[operation.field]}


def _change(operation: Operation, record_id: str, amount: int, state: State) -> Record:
    record = _record(operation, record_id, state)
    value = record[operation.field] + amount
    if not operation.low <= value <= operation.high:
        raise ToolFailure(f"{operation.field} of {record_id} must stay within {operation.low} and {operation.high}")
    record[operation.field] = value
    return {"id": record_id, operation.field: value}


def _positive(operation: Operation, amount: int) -> int:
    if amount < 1 or (operation.limit and amount > operation.limit):
        raise ToolFailure(f"amount must be 1 to {operation.limit or operation.high}")
    return amount


def _adjust(operation: Operation, arguments: Arguments, state: State) -> Record:
    amount = _positive(operation, arguments["amount"])
    return _change(operation, arguments["id"], operation.sign * amount, state)


def _move(operation: Operation, arguments: Arguments, state: State) -> Record:
    amount = _positive(operation, arguments["amount"])
    if arguments["source"] == arguments["target"]:
        raise ToolFailure("source and target are the same")
    left = _change(operation, arguments["source"], -amount, state)
    right = _change(operation, arguments["target"], amount, state)
    return {arguments["source"]: left[operation.field], arguments["target"]: right[operation.field]}


def _verb(operation: Operation, arguments: Arguments, state: State) -> Record:
    record = _record(operation, arguments["id"], state)
    before, after = operation.values
    if record["status"] != before:
        raise ToolFailure(f"{arguments['id']} is {record['status']}, not {before}")
    record["status"] = after
    return {"id": arguments["id"], "status": after}


def _total(operation: Operation, arguments: Arguments, state: State) -> Record:
    return {"total": sum(record[operation.field] for record in state[operation.entity].values())}


_ID = {"id": {"type": "string"}}
_AMOUNT = {"amount": {"type": "integer"}}

_EFFECTS: dict[str, Callable[[Operation, Arguments, State], Record]] = {
    "get": _get,
    "find": _find,
    "create": _create,
    "remove": _remove,
    "set": _set,
    "adjust": _adjust,
    "move": _move,
    "verb": _verb,
    "total": _total,
}

_PROPERTIES: dict[str, Callable[[Operation], Record]] = {
    "get": lambda _: _ID,
    "find": lambda o: {o.field: {"type": "string", "enum": list(o.values)}},
    "create": lambda o: _ID | ({o.field: {"type": "string", "enum": list(o.values)}} if o.field else {}),
    "remove": lambda _: _ID,
    "set": lambda o: _ID | {o.field: {"type": "string", "enum": list(o.values)}},
    "adjust": lambda _: _ID | _AMOUNT,
    "move": lambda _: {"source": {"type": "string"}, "target": {"type": "string"}} | _AMOUNT,
    "verb": lambda _: _ID,
    "total": lambda _: {},
}
