"""The judge: each criterion can fail, variation passes, and it knows nothing of plans, faults or mistakes."""

import ast
import inspect
import json
from typing import Any

import pytest

from k2.agentic import judge as module
from k2.agentic.judge import confusion, judge, reliability
from k2.agentic.rollout import PlannerPolicy, rollout
from k2.agentic.tasks import Rubric, flatten
from tests.agentic.helpers import deposit_task, environment, random_tasks

DONE = {
    "a1": {"balance": 70, "status": "open", "tier": "basic"},
    "a2": {"balance": 5, "status": "open", "tier": "basic"},
}


def dialog(*parts: Any) -> list[dict[str, Any]]:
    """User first; strings are what the assistant says, pairs (tool, result) are calls."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Increase a1 by 30."}]
    for index, part in enumerate(parts):
        if isinstance(part, str):
            messages.append({"role": "assistant", "content": part})
            continue
        tool, result = part
        call_id = f"functions.{tool}:{index}"
        calls = [{"id": call_id, "type": "function", "function": {"name": tool, "arguments": "{}"}}]
        messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        messages.append({"role": "tool", "tool_call_id": call_id, "content": json.dumps(result)})
    return messages


RUBRIC = deposit_task().rubric
GOOD = dialog("How much?", ("account_deposit", {"balance": 70}), "It is 70 now.")


def reasons(messages: list[dict[str, Any]], rubric: Rubric = RUBRIC, records: Any = None) -> tuple[str, ...]:
    return judge(messages, rubric, {"account": records or DONE}).reasons


def test_good_dialogs_pass_in_more_than_one_way() -> None:
    assert reasons(GOOD) == ()
    longer = dialog("How much?", ("account_get", {"balance": 40}), ("account_deposit", {"balance": 70}), "Done.")
    assert reasons(longer) == ()


@pytest.mark.parametrize(
    ("expected", "messages", "rubric", "records"),
    [
        ("goal", GOOD, RUBRIC, {**DONE, "a1": {**DONE["a1"], "balance": 100}}),
        ("collateral", GOOD, RUBRIC, {**DONE, "a2": {**DONE["a2"], "balance": 6}}),
        ("collateral", GOOD, RUBRIC, {**DONE, "a3": {"balance": 0}}),
        ("finished", GOOD[:-1], RUBRIC, DONE),
        ("order", dialog(("account_deposit", {"balance": 70}), "Done, all right?"), RUBRIC, DONE),
        ("conduct", GOOD, RUBRIC.model_copy(update={"forbidden": ("account_deposit",)}), DONE),
        ("process", GOOD, RUBRIC.model_copy(update={"required": (("account_get",),)}), DONE),
        ("answer", GOOD, RUBRIC.model_copy(update={"answers": ("7",)}), DONE),
        ("grounding", dialog("How much?", ("account_deposit", {"balance": 70}), "It is 71 now."), RUBRIC, DONE),
        ("economy", GOOD, RUBRIC.model_copy(update={"max_calls": 0}), DONE),
    ],
)
def test_each_criterion_can_fail(expected: str, messages: Any, rubric: Rubric, records: Any) -> None:
    assert reasons(messages, rubric, records) == (expected,)


def test_a_required_call_that_failed_does_not_count() -> None:
    rubric = RUBRIC.model_copy(update={"required": (("account_get",),)})
    failed = dialog("How much?", ("account_get", {"error": "timeout"}), ("account_deposit", {"balance": 70}), "Done.")
    assert reasons(failed, rubric) == ("process",)


@pytest.mark.parametrize(
    ("said", "answer", "stated"),
    [
        ("It is 30.", "30", True),
        ("It is 130.", "30", False),
        ("It is 10:30.", "30", False),
        ("It is 10:30.", "10:30", True),
        ("a17, a3", "a3", True),
        ("a17, a30", "a3", False),
        ("It is 30.5.", "30", False),
        ("Fix Typo", "fix typo", True),
    ],
)
def test_answers_are_whole_values(said: str, answer: str, stated: bool) -> None:
    user = {"role": "user", "content": said}
    verdict = judge([user, {"role": "assistant", "content": said}], Rubric(answers=(answer,)), {})
    assert verdict.scores["answer"] == float(stated)


def test_removed_records_are_expected_by_none() -> None:
    rubric = Rubric(changes={"account.a1.balance": None})
    assert reasons(dialog("Done."), rubric, {"x": {}}) == ("collateral",)
    assert judge(dialog("Done."), rubric, {}).passed


def test_verdicts_do_not_depend_on_hidden_truth() -> None:
    """Only transcript, rubric and state go in, and the module that judges imports nothing that knows more."""
    assert list(inspect.signature(judge).parameters) == ["messages", "rubric", "state"]
    tree = ast.parse(inspect.getsource(module))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"k2.agentic.planner", "k2.agentic.simulator", "k2.agentic.rollout"}


def test_judging_is_neither_blind_nor_an_echo_of_the_truth() -> None:
    policy = PlannerPolicy(0.6, 0.7)
    episodes = rollout(random_tasks(300, seed=2), policy, environment, seed=2)
    flawed = [bool(policy.mistakes[e.task.id]) for e in episodes]
    passed = [e.passed for e in episodes]
    assert sum(flawed) > 60
    caught = sum(bad and not ok for ok, bad in zip(passed, flawed, strict=True))
    assert caught / sum(flawed) > 0.5
    assert caught < sum(flawed)  # some mistakes were recovered from, or harmless


def test_reliability() -> None:
    assert reliability([True, True, False, False], [False, True, False, True]) == {
        "judge_precision": 0.5,
        "judge_recall": 0.5,
    }
    assert confusion([True, True, False, False, True], [False, True, False, True, False]) == [[2, 1], [1, 1]]
    assert reliability([False], [True]) == {"judge_precision": None, "judge_recall": None}


def test_flatten() -> None:
    assert flatten({"b": {"c": 1, "d": {}}, "a": [1]}) == {"a": [1], "b.c": 1, "b.d": {}}
