"""Goals over a synthetic domain, from one plain call to read-then-act, conditions and requests that leave things out.

Every builder takes the tools and the state as it will then be, and returns a goal whose reference calls succeed on it,
or None when this domain or state offers none. The state is advanced by the caller.
"""

import random
from collections.abc import Callable, Sequence
from copy import deepcopy

from k2.agentic.operations import Operation, Record, State, execute, sample_arguments
from k2.agentic.tasks import Call, Goal
from k2.agentic.tools import ToolSpec

Builder = Callable[[Sequence[ToolSpec], State, random.Random], Goal | None]


def semantics(tool: ToolSpec) -> Operation:
    """The operation of a synthetic tool."""
    if tool.operation is None:
        raise TypeError(f"{tool.name} is a tool of {tool.world}, which has no declared semantics")
    return tool.operation


def apply(goal: Goal, tools: Sequence[ToolSpec], state: State) -> State:
    """The state after the reference calls."""
    operations = {tool.name: semantics(tool) for tool in tools}
    after = deepcopy(state)
    for call in goal.calls:
        execute(operations[call.tool], call.arguments, after)
    return after


def direct(tools: Sequence[ToolSpec], state: State, rng: random.Random) -> Goal | None:
    """One call with everything said."""
    tool = rng.choice(tools)
    operation = semantics(tool)
    arguments = sample_arguments(operation, state, rng)
    if arguments is None:
        return None
    if operation.reads_only:
        return _question(tool, arguments, state, rng)
    return Goal(request=_imperative(tool, arguments, rng), question=False, calls=(_call(tool, arguments, state),))


def unclear(tools: Sequence[ToolSpec], state: State, rng: random.Random) -> Goal | None:
    """A change whose amount or value the user forgets to say."""
    able = [tool for tool in tools if semantics(tool).kind in ("adjust", "set") and not semantics(tool).then]
    if not able:
        return None
    tool = rng.choice(able)
    operation = semantics(tool)
    arguments = sample_arguments(operation, state, rng)
    if arguments is None:
        return None
    missing = "amount" if operation.kind == "adjust" else operation.field
    verb = {"adjust": "increase" if operation.sign > 0 else "decrease", "set": "change"}[operation.kind]
    return Goal(
        request=f"{verb} the {_words(operation.field)} of {_name(operation)} {arguments['id']}",
        question=False,
        calls=(_call(tool, arguments, state),),
        missing=missing,
        detail=str(arguments[missing]),
    )


def bring_to(tools: Sequence[ToolSpec], state: State, rng: random.Random) -> Goal | None:
    """A target value: the agent must read, compute the difference and change by it."""
    pair = _reader_and_changer(tools, state, rng)
    if pair is None:
        return None
    reader, changer, arguments = pair
    operation, record_id = semantics(changer), arguments["id"]
    target = state[operation.entity][record_id][operation.field] + operation.sign * arguments["amount"]
    return Goal(
        request=f"bring the {_words(operation.field)} of {_name(operation)} {record_id} to {target}",
        question=False,
        calls=(Call(tool=reader.name, arguments={"id": record_id}), _call(changer, arguments, state)),
    )


def condition(tools: Sequence[ToolSpec], state: State, rng: random.Random) -> Goal | None:
    """A change that must happen only if a value read first is below a bound; half of the time it must not."""
    pair = _reader_and_changer(tools, state, rng)
    if pair is None:
        return None
    reader, changer, arguments = pair
    operation, record_id = semantics(changer), arguments["id"]
    value = state[operation.entity][record_id][operation.field]
    bound = value + rng.randint(1, 9) if rng.random() < 0.5 else max(0, value - rng.randint(0, 9))
    calls = [Call(tool=reader.name, arguments={"id": record_id})]
    if value < bound:
        calls.append(_call(changer, arguments, state))
    change = "increase" if operation.sign > 0 else "decrease"
    field = _words(operation.field)
    return Goal(
        request=f"if the {field} of {_name(operation)} {record_id} is below {bound}, {change} it by "
        f"{arguments['amount']}",
        question=False,
        calls=tuple(calls),
    )


def compare(tools: Sequence[ToolSpec], state: State, rng: random.Random) -> Goal | None:
    """Two records to read at once, and the one with more of something to name."""
    readers = [tool for tool in tools if semantics(tool).kind == "get"]
    if not readers:
        return None
    operation = semantics(readers[0])
    records = state[operation.entity]
    if len(records) < 2:
        return None
    first, second = rng.sample(sorted(records), 2)
    field = rng.choice(sorted(name for name, value in records[first].items() if isinstance(value, int)))
    if records[first][field] == records[second][field]:
        return None
    return Goal(
        request=f"which {_name(operation)} has more {_words(field)}, {first} or {second}",
        question=True,
        calls=tuple(Call(tool=readers[0].name, arguments={"id": record_id}) for record_id in (first, second)),
        answers=(max(first, second, key=lambda record_id: records[record_id][field]),),
        parallel=True,
    )


def _reader_and_changer(
    tools: Sequence[ToolSpec], state: State, rng: random.Random
) -> tuple[ToolSpec, ToolSpec, Record] | None:
    readers = [tool for tool in tools if semantics(tool).kind == "get"]
    changers = [tool for tool in tools if semantics(tool).kind == "adjust" and not semantics(tool).then]
    if not readers or not changers:
        return None
    changer = rng.choice(changers)
    arguments = sample_arguments(semantics(changer), state, rng)
    return (readers[0], changer, arguments) if arguments else None


def _call(tool: ToolSpec, arguments: Record, state: State) -> Call:
    """A reference call with the record fields it leaves behind."""
    operation = semantics(tool)
    after = deepcopy(state)
    execute(operation, arguments, after)
    record_id = arguments["source"] if operation.kind == "move" else arguments["id"]
    return Call(tool=tool.name, arguments=arguments, effect=after[operation.entity].get(record_id, {}))


def _question(tool: ToolSpec, arguments: Record, state: State, rng: random.Random) -> Goal:
    operation = semantics(tool)
    name, field = _name(operation), _words(operation.field)
    result = execute(operation, arguments, deepcopy(state))
    if operation.kind == "get":
        key = rng.choice(sorted(set(result) - {"id"}))
        request = f"what is the {_words(key)} of {name} {arguments['id']}"
    elif operation.kind == "find":
        key, request = "ids", f"which {name} ids have {field} {arguments[operation.field]}"
    else:
        key, request = "total", f"what is the total {field} over every {name}"
    values = result[key] if isinstance(result[key], list) else [result[key]]
    return Goal(
        request=request,
        question=True,
        calls=(Call(tool=tool.name, arguments=arguments),),
        answers=tuple(map(str, values)) or ("none",),
        answer_key=key,
    )


def _imperative(tool: ToolSpec, arguments: Record, rng: random.Random) -> str:
    operation = semantics(tool)
    name, field = _name(operation), _words(operation.field)
    spoken = _words(tool.name.removeprefix(operation.entity + "_"))
    record_id = arguments.get("id", "")
    if operation.then:
        return f"{spoken} on {name} {record_id}, amount {arguments['amount']}, in one call"
    if operation.kind == "adjust" and rng.random() < 0.5:
        return f"{spoken} {arguments['amount']} on {name} {record_id}"
    phrases = {
        "create": f"create {name} {record_id} with {field} {arguments.get(operation.field)}",
        "remove": f"remove {name} {record_id}",
        "set": f"set the {field} of {name} {record_id} to {arguments.get(operation.field)}",
        "adjust": f"{'increase' if operation.sign > 0 else 'decrease'} the {field} of {name} {record_id} by "
        f"{arguments.get('amount')}",
        "move": f"move {arguments.get('amount')} {field} from {arguments.get('source')} to {arguments.get('target')}",
        "verb": f"{spoken} {name} {record_id}",
    }
    return phrases[operation.kind]


def _name(operation: Operation) -> str:
    return _words(operation.entity)


def _words(name: str) -> str:
    return name.replace("_", " ")


BUILDERS: dict[int, tuple[Builder, ...]] = {1: (direct,), 2: (unclear, bring_to, condition, compare)}
