"""Domains, their evolution, and the operational semantics of their tools."""

import random
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from k2.agentic.domains import initial_state, seed_domains, tools_of
from k2.agentic.evolve import evolve, executable, is_descendant
from k2.agentic.goals import semantics
from k2.agentic.operations import Operation, ToolFailure, execute, sample_arguments

POPULATION = evolve(60, seed=3)


def balance(**changes: object) -> Operation:
    return Operation(kind="adjust", entity="account", field="balance", low=0, high=100).model_copy(update=changes)


def account(value: int = 40, status: str = "open") -> dict[str, dict[str, dict[str, object]]]:
    return {"account": {"a1": {"balance": value, "status": status}, "a2": {"balance": 10, "status": "open"}}}


def test_evolution_repeats_and_names_are_unique() -> None:
    assert evolve(60, seed=3) == POPULATION
    assert evolve(60, seed=4) != POPULATION
    names = [tool.name for domain in POPULATION for tool in tools_of(domain)]
    assert len(names) == len(set(names)) > 500


def test_evolution_changes_more_than_names() -> None:
    children = POPULATION[len(seed_domains()) :]
    assert any(child.limit for child in children)
    assert any(child.guard for child in children)
    assert any(child.combined for child in children)
    assert any("review" in child.statuses for child in children)
    assert any(len(child.quantities) > 1 for child in children)


@pytest.mark.parametrize("domain", POPULATION, ids=lambda domain: domain.name)
def test_every_tool_works(domain: object) -> None:
    assert executable(domain, seed=9)  # type: ignore[arg-type]


def test_heldout_domains_keep_their_descendants() -> None:
    kept = [domain for domain in POPULATION if is_descendant(domain, ["heating"])]
    assert len(kept) > 1
    assert all(domain.name == "heating" or "heating" in domain.ancestors for domain in kept)


@given(st.integers(0, 10_000))
def test_sampled_arguments_fit_the_schema_and_succeed(seed: int) -> None:
    rng = random.Random(seed)
    domain = rng.choice(POPULATION)
    tool = rng.choice(tools_of(domain))
    state = initial_state(domain, 4, rng)
    arguments = sample_arguments(semantics(tool), state, rng)
    if arguments is None:
        return
    Draft202012Validator(tool.parameters).validate(arguments)
    before = deepcopy(state)
    execute(semantics(tool), arguments, state)
    assert (state == before) == semantics(tool).reads_only


def test_adjust_move_and_limits() -> None:
    state = account()
    assert execute(balance(sign=-1), {"id": "a1", "amount": 15}, state) == {"id": "a1", "balance": 25}
    assert execute(balance(kind="move"), {"source": "a1", "target": "a2", "amount": 5}, state) == {"a1": 20, "a2": 15}
    assert execute(Operation(kind="total", entity="account", field="balance"), {}, state) == {"total": 35}


@pytest.mark.parametrize(
    ("operation", "arguments", "message"),
    [
        (balance(sign=-1), {"id": "a1", "amount": 41}, "must stay within 0 and 100"),
        (balance(limit=5), {"id": "a1", "amount": 6}, "amount must be 1 to 5"),
        (balance(), {"id": "a9", "amount": 1}, "no account a9"),
        (balance(), {"id": "a1", "amount": -3}, "amount must be"),
        (balance(guard="frozen"), {"id": "a1", "amount": 1}, "a1 is open, not frozen"),
        (balance(kind="move"), {"source": "a1", "target": "a1", "amount": 1}, "are the same"),
        (Operation(kind="verb", entity="account", values=("frozen", "open")), {"id": "a1"}, "not frozen"),
        (Operation(kind="create", entity="account", template={"status": "open"}), {"id": "a1"}, "exists already"),
    ],
)
def test_refusals_say_why(operation: Operation, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ToolFailure, match=message):
        execute(operation, arguments, account())


def test_combined_tools_do_both() -> None:
    state = account()
    freeze = Operation(kind="verb", entity="account", values=("open", "frozen"))
    execute(balance(then=freeze), {"id": "a1", "amount": 2}, state)
    assert state["account"]["a1"] == {"balance": 42, "status": "frozen"}
