"""The dialog environment: user, simulator with faults, snapshots, and the planner that acts in it."""

import json
from typing import Any

import pytest

from k2.agentic.environment import Environment, Message
from k2.agentic.planner import Planner
from k2.agentic.rollout import Episode, ModelPolicy, PlannerPolicy, rollout
from k2.agentic.tasks import Task
from k2.config.synthesize import FaultRates
from k2.generation.protocol import Completion, GenerationRequest
from k2.serving.chat_template import render
from tests.agentic.helpers import CALM, deposit_task, environment, random_tasks


def call(tool: str, index: int = 0, **arguments: Any) -> Message:
    function = {"name": tool, "arguments": json.dumps(arguments)}
    calls = [{"id": f"functions.{tool}:{index}", "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def say(text: str) -> Message:
    return {"role": "assistant", "content": text}


def test_a_whole_dialog() -> None:
    world: Environment[Task] = environment()
    opening = world.reset(deposit_task(), 0)
    assert [message["role"] for message in opening] == ["system", "user"]
    assert opening[1]["content"] == "Increase the balance of account a1."
    assert [tool["function"]["name"] for tool in world.tools] == ["account_deposit", "account_get"]
    answer = world.step(say("How much?"))
    assert answer.observation == ({"role": "user", "content": "The amount is 30."},)
    result = world.step(call("account_deposit", id="a1", amount=30))
    assert json.loads(result.observation[0]["content"]) == {"id": "a1", "balance": 70}
    assert not result.done
    assert not result.rewards
    end = world.step(say("Done."))
    assert end.done
    assert not end.observation
    assert end.rewards["passed"] == 1


@pytest.mark.parametrize(
    ("action", "error"),
    [
        (call("account_deposit", id="a1"), "'amount' is a required property"),
        (call("account_deposit", id="a1", amount="x"), "is not of type 'integer'"),
        (call("teleport"), "no tool teleport"),
        (call("account_get", id="a7"), "no account a7"),
    ],
)
def test_bad_calls_are_answered(action: Message, error: str) -> None:
    world = environment()
    world.reset(deposit_task(), 0)
    assert error in json.loads(world.step(action).observation[0]["content"])["error"]


def test_malformed_arguments_are_answered() -> None:
    world = environment()
    world.reset(deposit_task(), 0)
    broken = call("account_get", id="a1")
    broken["tool_calls"][0]["function"]["arguments"] = "{"
    assert "bad arguments" in world.step(broken).observation[0]["content"]


def test_needless_questions_end() -> None:
    world = environment(max_turns=6)
    world.reset(deposit_task(), 0)
    replies = [world.step(say("Really?")) for _ in range(3)]
    assert [reply.done for reply in replies] == [False, False, True]


def test_dialogs_are_cut_off() -> None:
    world = environment(max_turns=3)
    world.reset(deposit_task(), 0)
    steps = [world.step(call("account_get", index, id="a1")) for index in range(3)]
    assert [step.done for step in steps] == [False, False, True]
    assert steps[-1].rewards["finished"] == 0


@pytest.mark.parametrize("fault", ["error", "timeout"])
def test_faults_without_effect(fault: str) -> None:
    world = environment(CALM.model_copy(update={fault: 1.0}))
    world.reset(deposit_task(), 0)
    assert "try again" in world.step(call("account_deposit", id="a1", amount=30)).observation[0]["content"]
    assert world.simulator.world.state() == deposit_task().initial
    assert world.simulator.faults == [fault]


def test_partial_failures_do_the_work_and_lose_the_answer() -> None:
    world = environment(CALM.model_copy(update={"partial": 1.0}))
    world.reset(deposit_task(), 0)
    answer = world.step(call("account_deposit", id="a1", amount=30)).observation[0]["content"]
    assert json.loads(answer) == {"error": "connection lost, result unknown"}
    assert world.simulator.world.state()["account"]["a1"]["balance"] == 70


def test_snapshots_continue_exactly() -> None:
    rates = FaultRates(error=0.2, timeout=0.2, partial=0.2)
    for task in random_tasks(20):
        actions = [m for m in play(task, rates).environment.messages if m["role"] == "assistant"]
        whole, resumed = environment(rates), environment(rates)
        whole.reset(task, 5)
        for action in actions[:2]:
            whole.step(action)
        resumed.restore(task, json.loads(json.dumps(whole.snapshot())))
        rest = [(whole.step(action), resumed.step(action)) for action in actions[2:]]
        assert all(a == b for a, b in rest)
        assert resumed.messages == whole.messages


def play(task: Task, rates: FaultRates) -> Episode:
    return rollout([task], PlannerPolicy(0, 0), lambda: environment(rates), seed=5)[0]


def test_the_planner_solves_every_task_in_a_calm_world() -> None:
    episodes = rollout(random_tasks(150), PlannerPolicy(0, 0), environment, seed=1)
    assert [e.task.id for e in episodes if not e.passed] == []


def test_the_planner_retries_and_checks_lost_confirmations() -> None:
    rates = FaultRates(error=0.1, timeout=0.1, partial=0.3)
    episodes = rollout(random_tasks(150), PlannerPolicy(0, 0), lambda: environment(rates), seed=1)
    faulty = [e for e in episodes if e.environment.simulator.faults]
    assert len(faulty) > 50
    assert sum(e.passed for e in faulty) / len(faulty) > 0.8
    assert all(e.passed for e in episodes if not e.environment.simulator.faults)


def test_independent_calls_go_out_together() -> None:
    episodes = rollout(random_tasks(150), PlannerPolicy(0, 0), environment, seed=1)
    together = [e for e in episodes if any(len(m.get("tool_calls", ())) > 1 for m in e.environment.messages)]
    assert together
    for episode in together:
        ids = [c["id"] for m in episode.environment.messages for c in m.get("tool_calls", ())]
        assert [call_id.rpartition(":")[2] for call_id in ids] == [str(index) for index in range(len(ids))]


def test_mistakes_happen_and_only_where_planned() -> None:
    tasks = random_tasks(150)
    policy = PlannerPolicy(1.0, 0.5)
    rollout(tasks, policy, environment, seed=1)
    made = {mistake for mistakes in policy.mistakes.values() for mistake in mistakes}
    assert {"wrong_tool", "wrong_argument", "premature_end", "hallucinated_answer", "skipped_question"} <= made
    assert Planner(tasks[0], "x", 0.0, 0.5).mistakes == []


class Scripted:
    """A generator that says fixed texts in K2's format, round by round."""

    identity = "scripted"

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.requests: list[GenerationRequest] = []

    def generate(self, requests: Any, *, stream: Any = None) -> list[Completion]:
        self.requests += requests
        return [Completion(self.texts.pop(0)) for _ in requests]


def test_a_model_acts_through_the_generator_protocol() -> None:
    turns = [say("How much?"), call("account_deposit", id="a1", amount=30), say("Done.")]
    texts = ["".join(s.text for s in render([turn], default_system=None) if s.trainable) for turn in turns]
    generator = Scripted(texts)
    (episode,) = rollout([deposit_task()], ModelPolicy(generator, 0.6, 64), environment, seed=1)
    assert episode.passed
    assert [m for m in episode.environment.messages if m["role"] == "assistant"][1]["tool_calls"][0]["id"] == (
        "functions.account_deposit:0"
    )
    assert len(generator.requests) == 3
    assert generator.requests[2].messages[-1]["role"] == "tool"
