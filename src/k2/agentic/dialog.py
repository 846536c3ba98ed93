"""The environment of agentic tasks: a user, an agent's tools, and a world behind them."""

from collections.abc import Callable, Sequence
from typing import Any

from k2.agentic.environment import Message, Snapshot, Step, Tool
from k2.agentic.judge import judge
from k2.agentic.simulator import Simulator, World
from k2.agentic.tasks import Task
from k2.agentic.user import User
from k2.config.synthesize import FaultRates


class DialogEnvironment:
    """Implements k2.agentic.environment.Environment[Task].

    `open_world` makes the world of a task in its initial state. A snapshot is the list of actions so far: everything
    else follows from the task and the seed, so restoring replays them.
    """

    def __init__(self, open_world: Callable[[Task], World], rates: FaultRates, max_turns: int) -> None:
        self._open_world = open_world
        self._rates = rates
        self._max_turns = max_turns

    @property
    def tools(self) -> Sequence[Tool]:
        """Declarations of the agent's tools."""
        return [tool.declaration() for tool in self._task.agent.tools]

    def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        """See Environment; opens with the system prompt and the user's first request."""
        self._task = task
        self._seed = seed
        self._actions: list[Message] = []
        self.simulator = Simulator(self._open_world(task), task.agent.tools, self._rates, f"{seed}/{task.id}")
        self._user = User(task, f"{seed}/{task.id}")
        self._acted = False
        system = {"role": "system", "content": task.agent.system}
        self.messages: list[Message] = [system, {"role": "user", "content": self._user.opening()}]
        return tuple(self.messages)

    def step(self, action: Message) -> Step:
        """See Environment; the rewards of the last step are the judge's scores."""
        self._actions.append(action)
        observation = self._react(action)
        self.messages += [action, *observation]
        done = not observation or len(self._actions) >= self._max_turns
        return Step(observation, self._rewards() if done else {}, done)

    def snapshot(self) -> Snapshot:
        """See Environment."""
        return {"seed": self._seed, "actions": [dict(action) for action in self._actions]}

    def restore(self, task: Task, snapshot: Snapshot) -> None:
        """See Environment."""
        self.reset(task, snapshot["seed"])
        for action in snapshot["actions"]:
            self.step(action)

    def _react(self, action: Message) -> tuple[Message, ...]:
        calls: Sequence[dict[str, Any]] = action.get("tool_calls") or ()
        if calls:
            self._acted = True
            return tuple(
                {"role": "tool", "tool_call_id": call["id"], "content": self.simulator.answer(call)} for call in calls
            )
        reply = self._user.reply(action["content"], acted=self._acted)
        self._acted = False
        return () if reply is None else ({"role": "user", "content": reply},)

    def _rewards(self) -> dict[str, float]:
        verdict = judge(self.messages, self._task.rubric, self.simulator.world.state())
        return {**verdict.scores, "passed": float(verdict.passed)}
