"""The user: a persona that states its goals in its own style, answers questions, and follows up."""

import random

from k2.agentic.tasks import Goal, Task


class User:
    """Plays one task's persona. Knows the goals, sees only what the assistant says."""

    def __init__(self, task: Task, seed: str) -> None:
        self._task = task
        self._rng = random.Random(f"user/{seed}")
        self._goal = 0
        self._told = False
        self._pressed = False

    def opening(self) -> str:
        """The first request."""
        return self._say(self._task.goals[0], first=True)

    def reply(self, text: str, *, acted: bool) -> str | None:
        """What the user says to an assistant message without tool calls; None when nothing is left to want.

        `acted` tells whether the assistant has called a tool since the user last spoke.
        """
        goal = self._task.goals[self._goal]
        asked = "?" in text and not acted
        if asked and goal.missing and not self._told:
            self._told = True
            return self._detail(goal)
        if asked and not self._pressed:
            self._pressed = True
            return "Please just do it."
        self._goal, self._told, self._pressed = self._goal + 1, False, False
        if self._goal == len(self._task.goals):
            return None
        return self._say(self._task.goals[self._goal], first=False)

    def _detail(self, goal: Goal) -> str:
        phrases = {
            "plain": f"The {goal.missing} is {goal.detail}.",
            "polite": f"Sorry, {goal.detail} please.",
            "terse": goal.detail,
            "chatty": f"Oh, I forgot! Make it {goal.detail}.",
        }
        return phrases[self._task.persona.style]

    def _say(self, goal: Goal, *, first: bool) -> str:
        style, request = self._task.persona.style, goal.request
        if style == "terse":
            return request
        sentence = request[0].upper() + request[1:] + ("?" if goal.question else ".")
        if style == "plain":
            return sentence if first else f"Also: {sentence}"
        if style == "polite":
            return f"Could you tell me: {request}?" if goal.question else f"Please {request}. Thank you."
        greeting = self._rng.choice((f"Hi, {self._task.persona.name} here.", "Hello!", "Good day!"))
        return f"{greeting if first else 'Great, one more thing.'} {sentence}"
