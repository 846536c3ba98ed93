"""The reference planner: an acting agent without a language model, who makes mistakes for the judge to find.

It knows the reference calls of its task, but acts only through messages, and reads results like any agent: it asks for
what is missing, retries after transient failures, checks after lost confirmations, and answers from what tools said.
With some probability one mistake is planned; what it really did wrong is in `mistakes`, which the judge never sees.
"""

import random
from collections.abc import Generator, Sequence
from typing import Any, Literal, get_args

from k2.agentic.environment import Message
from k2.agentic.simulator import FAULT_TEXT
from k2.agentic.tasks import Call, Goal, Task
from k2.serving.chat_template import compact_json
from k2.serving.tool_calls import loads_object

Mistake = Literal[
    "wrong_tool",
    "wrong_argument",
    "skipped_retry",
    "blind_retry",
    "premature_end",
    "hallucinated_answer",
    "skipped_question",
    "extra_call",
]
Acts = Generator[Message, Sequence[Message], str]

ATTEMPTS = 3
TRANSIENT = (FAULT_TEXT["error"], FAULT_TEXT["timeout"])


class Planner:
    """Acts in one episode; drive `episode()` with `send(observation)` for the next message."""

    def __init__(self, task: Task, seed: str, mistake_rate: float, recovery_rate: float) -> None:
        self.mistakes: list[Mistake] = []
        self._task = task
        self._rng = random.Random(f"planner/{seed}")
        self._recovery_rate = recovery_rate
        self._planned = self._rng.choice(_possible(task)) if self._rng.random() < mistake_rate else None
        self._calls = 0

    def episode(self) -> Acts:
        """The messages of the whole dialog, goal by goal; returns at the end what was said last."""
        said = ""
        for goal in self._task.goals:
            said = yield from self._pursue(goal)
        return said

    def _pursue(self, goal: Goal) -> Acts:
        calls = list(goal.calls)
        if goal.missing and self._slips("skipped_question"):
            calls[-1] = calls[-1].model_copy(update={"arguments": self._altered(calls[-1].arguments, goal.missing)})
        elif goal.missing:
            yield _say(f"What {goal.missing.replace('_', ' ')} should it be?")
        if self._slips("premature_end"):
            calls.pop()
        texts: list[str] = []
        if goal.parallel:
            texts = yield from self._do_together(calls)
        else:
            for call in calls:
                texts.append((yield from self._do(call)))
        said = self._reply(goal, texts)
        yield _say(said)
        return said

    def _do(self, call: Call) -> Acts:
        """One reference call, with the mistakes that can befall it; returns the last result."""
        if self._slips("extra_call"):
            yield from self._send(self._rng.choice(self._task.agent.tools).name, call.arguments)
        wrong = self._wrong(call)
        if wrong is None:
            return (yield from self._persist(call))
        text = yield from self._persist(wrong)
        noticed = _error(text) is not None and self._rng.random() < self._recovery_rate
        return (yield from self._persist(call)) if noticed else text

    def _do_together(self, calls: Sequence[Call]) -> Generator[Message, Sequence[Message], list[str]]:
        """Independent calls in one message; those that fail for now are tried again one by one."""
        chosen = [self._wrong(call) or call for call in calls]
        observation = yield self._message([(call.tool, call.arguments) for call in chosen])
        texts = [str(message["content"]) for message in observation]
        for index, call in enumerate(chosen):
            if _error(texts[index]) in TRANSIENT and not self._slips("skipped_retry"):
                texts[index] = yield from self._persist(call)
        return texts

    def _wrong(self, call: Call) -> Call | None:
        others = [tool.name for tool in self._task.agent.tools if tool.name != call.tool]
        if others and self._slips("wrong_tool"):
            return call.model_copy(update={"tool": self._rng.choice(others)})
        if call.arguments and self._slips("wrong_argument"):
            name = self._rng.choice(sorted(call.arguments))
            return call.model_copy(update={"arguments": self._altered(call.arguments, name)})
        return None

    def _persist(self, call: Call) -> Acts:
        """Call until it works, is refused for good, or patience ends."""
        text = ""
        for _ in range(ATTEMPTS):
            text = yield from self._send(call.tool, call.arguments)
            error = _error(text)
            if error is None and '"more":true' not in text:
                return text
            if error == FAULT_TEXT["partial"]:
                if self._slips("blind_retry"):
                    continue
                if (yield from self._took_effect(call)):
                    return compact_json(call.effect)
                continue
            if (error and error not in TRANSIENT) or self._slips("skipped_retry"):
                return text
        return text

    def _took_effect(self, call: Call) -> Generator[Message, Sequence[Message], bool]:
        """Read the record after a lost confirmation and compare it with what the call should have left."""
        readers = [tool for tool in self._task.agent.tools if tool.operation and tool.operation.kind == "get"]
        record_id = call.arguments.get("id") or call.arguments.get("source")
        text = yield from self._persist(Call(tool=readers[0].name, arguments={"id": record_id}))
        if _error(text):
            return not call.effect
        return {"id": record_id, **call.effect} == loads_object(text)

    def _send(self, tool: str, arguments: dict[str, Any]) -> Acts:
        observation = yield self._message([(tool, arguments)])
        return str(observation[0]["content"])

    def _message(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> Message:
        made = [
            {
                "id": f"functions.{tool}:{self._calls + index}",
                "type": "function",
                "function": {"name": tool, "arguments": compact_json(arguments)},
            }
            for index, (tool, arguments) in enumerate(calls)
        ]
        self._calls += len(made)
        return {"role": "assistant", "content": "", "tool_calls": made}

    def _reply(self, goal: Goal, texts: Sequence[str]) -> str:
        decisive = texts if goal.parallel else texts[-1:]
        failed = not decisive or any(_error(text) is not None for text in decisive)
        if goal.question:
            values = [] if failed else self._values(goal, "\n".join(decisive))
            if self._slips("hallucinated_answer") or (failed and self.mistakes):
                values = [self._other(goal.answers[0])]
            return f"It is {', '.join(values)}." if values else "Sorry, I could not find out."
        if failed and not self.mistakes:
            return "Sorry, that did not work."
        return self._rng.choice(("Done.", "It is done.", "All set."))

    def _values(self, goal: Goal, text: str) -> list[str]:
        """What to answer, read out of the result."""
        if not goal.answer_key:
            return [answer for answer in goal.answers if answer in text]
        value = loads_object(text).get(goal.answer_key, "none")
        return [str(item) for item in value] or ["none"] if isinstance(value, list) else [str(value)]

    def _altered(self, arguments: dict[str, Any], name: str) -> dict[str, Any]:
        value = arguments[name]
        if isinstance(value, list):
            return arguments | {name: [self._other(str(item)) for item in value]}
        return arguments | {name: value + self._rng.randint(1, 9) if isinstance(value, int) else self._other(value)}

    def _other(self, text: str) -> str:
        """A different text of the same kind: another number, or a word that is wrong here."""
        digits = "".join(self._rng.choice("123456789") if c.isdigit() else c for c in text)
        return digits if digits != text else f"{text}x"

    def _slips(self, mistake: Mistake) -> bool:
        """Whether the planned mistake happens at this opportunity."""
        if self._planned != mistake or self._rng.random() < 0.3:
            return False
        self._planned = None
        self.mistakes.append(mistake)
        return True


def _possible(task: Task) -> list[Mistake]:
    """Mistakes this task gives an opportunity for; whether a call will fail first is not known beforehand."""
    impossible = {
        "wrong_tool": len(task.agent.tools) == 1,
        "hallucinated_answer": not any(goal.question for goal in task.goals),
        "skipped_question": not any(goal.missing for goal in task.goals),
    }
    return [mistake for mistake in get_args(Mistake) if not impossible.get(mistake)]


def _say(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _error(text: str) -> str | None:
    try:
        error = loads_object(text).get("error")
    except ValueError:
        return None
    return None if error is None else str(error)
