import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2.errors import UserError
from k2.evaluation.tasks import (
    BASIC_TOOLS,
    REASONING_GYM,
    Example,
    ToolCall,
    assistant_text,
    get_task,
    prompt_split,
    sample_mixture,
    split_of,
    split_seed,
    task_names,
)

FAST = ["addition_2", "reversed_addition_2", "subtraction_3", "multiplication_1", "tool_call"]


@pytest.mark.parametrize("name", task_names())
def test_every_task_gives_its_own_answer_full_marks_and_nonsense_none(name: str) -> None:
    task = get_task(name)
    for index in range(3):
        example = task.sample(split_seed("eval", 7), index)
        assert task.score(example, assistant_text(example.answer)) == 1.0
        assert task.score(example, "") <= 0.01
        assert task.score(example, "xyzzy ]}{ 1/0") < 1.0


@given(train=st.integers(0, 10**6), heldout=st.integers(0, 10**6), name=st.sampled_from(FAST))
def test_no_training_seed_ever_yields_an_evaluation_prompt(train: int, heldout: int, name: str) -> None:
    assert split_of(split_seed("train", train)) == "train"
    assert split_of(split_seed("eval", heldout)) == "eval"
    assert split_seed("train", train) != split_seed("eval", heldout)
    assert prompt_split(get_task(name).sample(split_seed("train", train), 0)) == "train"
    assert prompt_split(get_task(name).sample(split_seed("eval", heldout), 0)) == "eval"


def test_the_split_holds_over_the_whole_problem_space() -> None:
    task = get_task("addition_1")
    sides = {
        side: {str(task.sample(split_seed(side, seed), i).messages) for seed in range(20) for i in range(60)}
        for side in ("train", "eval")
    }
    assert not sides["train"] & sides["eval"]
    assert len(sides["train"] | sides["eval"]) == 100
    assert 10 <= len(sides["eval"]) <= 32


def test_samples_are_reproducible_and_vary_with_seed_and_index() -> None:
    task = get_task("addition_3")
    first = task.sample(2, 0)
    assert first == task.sample(2, 0)
    assert first != task.sample(4, 0)
    assert first != task.sample(2, 1)


def test_arithmetic_is_right() -> None:
    for name, expected in [("addition_2", lambda a, b: a + b), ("multiplication_2", lambda a, b: a * b)]:
        example = get_task(name).sample(0, 5)
        problem = example.messages[0]["content"].removesuffix("=")
        a, b = (int(part) for part in problem.replace("*", "+").split("+"))
        assert example.answer["content"] == str(expected(a, b))
    example = get_task("reversed_addition_2").sample(0, 5)
    a, b = (int(part) for part in example.messages[0]["content"].removeprefix("rev ").removesuffix("=").split("+"))
    assert example.answer["content"] == str(a + b)[::-1]


def test_malformed_answers_never_raise() -> None:
    junk = ["", "-", "1e999999", "[1,", "\x00", "9" * 5000, "×", "<|tool_calls_section_begin|>"]
    for name in [*FAST, *(f"reasoning_gym/{family}" for family in REASONING_GYM)]:
        example = get_task(name).sample(0, 0)
        assert all(0.0 <= get_task(name).score(example, text) < 1.0 for text in junk)


def _call(name: str, arguments: str, copies: int = 1) -> str:
    function = {"name": name, "arguments": arguments}
    call = {"id": f"functions.{name}:0", "type": "function", "function": function}
    return assistant_text({"role": "assistant", "content": "", "tool_calls": [call] * copies})


def _move() -> Example:
    task = get_task("tool_call")
    examples = (task.sample(0, index) for index in range(500))
    return next(e for e in examples if e.answer["tool_calls"][0]["function"]["name"] == "move")


def test_tool_calls_are_compared_as_values_and_against_the_schema() -> None:
    example, task = _move(), get_task("tool_call")
    wanted = json.loads(example.answer["tool_calls"][0]["function"]["arguments"])
    swapped = json.dumps(dict(reversed(wanted.items())), indent=2)
    assert task.score(example, _call("move", swapped)) == 1.0
    assert task.score(example, "Sure. " + _call("move", swapped)) == 1.0
    wrong = [
        _call("move", json.dumps({**wanted, "steps": wanted["steps"] + 1})),
        _call("move", json.dumps({**wanted, "steps": str(wanted["steps"])})),
        _call("move", json.dumps({"side": wanted["side"]})),
        _call("move", "not json"),
        _call("move", "[]"),
        _call("lamp", json.dumps(wanted)),
        _call("move", json.dumps(wanted), copies=2),
    ]
    assert [task.score(example, text) for text in wrong] == [0.0] * len(wrong)


def test_a_boolean_is_not_an_integer() -> None:
    parameters = {"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"]}
    parameters["properties"]["n"]["type"] = "integer"
    tool = {"type": "function", "function": {"name": "f", "description": "F", "parameters": parameters}}
    tasks = [tool, *BASIC_TOOLS]
    task = ToolCall("custom", tasks)
    examples = (task.draw(0, index) for index in range(500))
    example = next(e for e in examples if e.answer["tool_calls"][0]["function"]["name"] == "f")
    assert task.score(example, _call("f", '{"n": 1}')) == 1.0
    assert task.score(example, _call("f", '{"n": true}')) == 0.0


def test_tools_with_nested_arguments_are_left_out() -> None:
    nested = {"type": "object", "properties": {"items": {"type": "array"}}, "required": ["items"]}
    tool = {"type": "function", "function": {"name": "f", "description": "F", "parameters": nested}}
    with pytest.raises(UserError, match="plain arguments"):
        ToolCall("custom", [tool])


def test_unknown_tasks_and_impossible_splits_are_user_errors() -> None:
    with pytest.raises(UserError, match="unknown task 'nope'"):
        get_task("nope")

    class Single(type(get_task("addition_1"))):  # type: ignore[misc]
        def draw(self, seed: int, index: int) -> Example:
            return get_task("addition_1").draw(0, 0)

    single = Single("single", "+", 1)
    other = 0 if prompt_split(single.draw(0, 0)) == "eval" else 1
    with pytest.raises(UserError, match="more variety"):
        single.sample(other, 0)


def test_a_mixture_follows_its_weights() -> None:
    names = [sample_mixture({"addition_1": 3.0, "tool_call": 1.0}, "train", 1, i).task for i in range(400)]
    assert 0.68 < names.count("addition_1") / 400 < 0.82
