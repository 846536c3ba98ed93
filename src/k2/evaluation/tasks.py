"""Verifiable tasks: each makes examples from seeds and scores answers by itself; torch-free.

A task splits its own problems: a fixed hash sends every distinct prompt either to training or to evaluation, and a
seed belongs to one side (`split_seed`). No training seed, whatever its number, yields an evaluation prompt.
"""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any, Literal

import jsonschema

from k2.errors import UserError
from k2.generation.protocol import Message, Tool
from k2.serving.chat_template import IM_END, compact_json, render
from k2.serving.tool_calls import parse_assistant

log = logging.getLogger(__name__)

Split = Literal["train", "eval"]
EVAL_SHARE = 0.2
"""Share of all distinct prompts that is kept for evaluation."""


@dataclass(frozen=True)
class Example:
    """One problem: what the model reads, and the assistant message that solves it.

    `entry` is what the task's verifier needs beside the answer.
    """

    task: str
    messages: Sequence[Message]
    tools: Sequence[Tool]
    answer: Message
    entry: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC):
    """A family of problems with a verifier."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def draw(self, seed: int, index: int) -> Example:
        """Any problem of the family, on either side of the split; equal arguments, equal problem."""

    @abstractmethod
    def score(self, example: Example, text: str) -> float:
        """Value in [0, 1] of an assistant message (without its end token); 1 is a full pass. Never raises."""

    def sample(self, seed: int, index: int) -> Example:
        """Problem `index` of a seed made by `split_seed`; problems are independent draws of the seed's side.

        Raises:
            UserError: the family has no problem on that side.
        """
        wanted = split_of(seed)
        for attempt in range(1000):
            example = self.draw(seed, index * 1000 + attempt)
            if prompt_split(example) == wanted:
                return example
        raise UserError(f"task {self.name!r} has no {wanted} problem among 1000 draws; give it more variety")


def split_seed(split: Split, seed: int) -> int:
    """The task seed of a run seed: even for training, odd for evaluation."""
    return 2 * seed + (split == "eval")


def split_of(seed: int) -> Split:
    """The side a task seed belongs to."""
    return "eval" if seed % 2 else "train"


def prompt_fraction(example: Example, salt: str = "split") -> float:
    """A fixed pseudo-random number in [0, 1) of the prompt's content, the same on every machine."""
    content = json.dumps([salt, list(example.messages), list(example.tools)], sort_keys=True)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:6], "big") / 2**48


def prompt_split(example: Example) -> Split:
    """The side a prompt belongs to, by its content alone."""
    return "eval" if prompt_fraction(example) < EVAL_SHARE else "train"


class Arithmetic(Task):
    """`a+b=` over numbers of `digits` digits; reversed: `rev a+b=`, the answer's last digit first."""

    def __init__(self, name: str, operator: str, digits: int, *, reverse: bool = False) -> None:
        super().__init__(name)
        self._operator, self._reverse = operator, reverse
        self._operands = range(10 ** (digits - 1) if digits > 1 else 0, 10**digits)

    def draw(self, seed: int, index: int) -> Example:
        """Two uniform operands."""
        random = Random(f"{self.name}/{seed}/{index}")
        a, b = random.choice(self._operands), random.choice(self._operands)
        value = str({"+": a + b, "-": a - b, "*": a * b}[self._operator])
        problem = f"{a}{self._operator}{b}"
        prompt = f"rev {problem}=" if self._reverse else f"{problem}="
        return _text_example(self.name, prompt, value[::-1] if self._reverse else value)

    def score(self, example: Example, text: str) -> float:
        """1 for exactly the digits of the answer."""
        return float(text.strip() == example.answer["content"])


class ReasoningGym(Task):
    """One family of the reasoning_gym package with its own verifier (which may give partial credit)."""

    def __init__(self, name: str) -> None:
        # Takes seconds to import and only runs that name one of its families need it.
        import reasoning_gym

        super().__init__(name)
        self._dataset = reasoning_gym.create_dataset(name.removeprefix("reasoning_gym/"), seed=0, size=2**31)

    def draw(self, seed: int, index: int) -> Example:
        """Item of the package's own dataset; seed and index are hashed because it would add the two."""
        digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
        entry = self._dataset[int.from_bytes(digest[:4], "big") % 2**31]
        return _text_example(self.name, str(entry["question"]).strip(), str(entry["answer"]), entry)

    def score(self, example: Example, text: str) -> float:
        """The family's score; an answer its verifier cannot read scores 0."""
        try:
            return float(self._dataset.score_answer(text.strip(), dict(example.entry)))
        except Exception as error:  # third-party verifiers raise anything on malformed answers
            log.debug("%s could not score %r: %s", self.name, text, error)
            return 0.0


class ToolCall(Task):
    """Read a request, choose among one or two tools and emit the one right call.

    Works on any OpenAI-style tools whose arguments are strings, numbers, booleans or enumerations, so the same
    task measures tools that training never saw.
    """

    def __init__(self, name: str, tools: Sequence[Tool]) -> None:
        super().__init__(name)
        self._tools = [tool["function"] for tool in tools if _simple(tool["function"])]
        if not self._tools:
            raise UserError(f"task {name!r}: none of {len(tools)} tools has only plain arguments")

    def draw(self, seed: int, index: int) -> Example:
        """A tool, its arguments and sometimes a second tool that is not meant."""
        random = Random(f"{self.name}/{seed}/{index}")
        shown = random.sample(self._tools, min(len(self._tools), random.choice((1, 2))))
        wanted = random.choice(shown)
        arguments = {name: _value(random, schema) for name, schema in _required(wanted).items()}
        listed = ", ".join(f"{name} {_spoken(value)}" for name, value in arguments.items())
        call = {"name": wanted["name"], "arguments": compact_json(arguments)}
        return Example(
            task=self.name,
            messages=[{"role": "user", "content": f"{wanted.get('description') or wanted['name']}: {listed}"}],
            tools=[{"type": "function", "function": function} for function in shown],
            answer={
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": f"functions.{wanted['name']}:0", "type": "function", "function": call}],
            },
        )

    def score(self, example: Example, text: str) -> float:
        """1 for exactly one call that fits the tool's schema and equals the wanted one."""
        _, calls = parse_assistant(text)
        if len(calls) != 1:
            return 0.0
        made, wanted = calls[0]["function"], example.answer["tool_calls"][0]["function"]
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in example.tools}
        if made["name"] != wanted["name"]:
            return 0.0
        try:
            arguments = json.loads(made["arguments"])
            jsonschema.validate(arguments, schemas[made["name"]])
        except (json.JSONDecodeError, RecursionError, jsonschema.ValidationError):
            return 0.0
        return float(arguments == json.loads(wanted["arguments"]))


def assistant_text(message: Message) -> str:
    """An assistant message as the model writes it, tool calls in their markup, without the end token."""
    said = [segment.text for segment in render([message], default_system=None) if segment.trainable]
    return "".join(said).removesuffix(IM_END)


def _text_example(task: str, prompt: str, answer: str, entry: Mapping[str, Any] | None = None) -> Example:
    messages = [{"role": "user", "content": prompt}]
    return Example(task, messages, (), {"role": "assistant", "content": answer}, entry or {})


_PLAIN = ("string", "integer", "number", "boolean")
_WORDS = ("tea", "blue", "Rome", "north", "milk", "Lima", "red", "Oslo", "rice", "Kyoto")


def _required(function: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = function.get("parameters", {})
    properties = parameters.get("properties", {})
    return {name: properties[name] for name in parameters.get("required", sorted(properties))}


def _simple(function: Mapping[str, Any]) -> bool:
    schemas = _required(function).values()
    return bool(schemas) and all("enum" in schema or schema.get("type") in _PLAIN for schema in schemas)


def _value(random: Random, schema: Mapping[str, Any]) -> Any:
    if "enum" in schema:
        return random.choice(schema["enum"])
    low = int(schema.get("minimum", 0))
    number = random.randint(low, int(schema.get("maximum", low + 99)))
    choices = {"string": random.choice(_WORDS), "integer": number, "number": number, "boolean": random.random() < 0.5}
    return choices[schema["type"]]


def _spoken(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _tool(name: str, description: str, **arguments: Mapping[str, Any]) -> Tool:
    parameters = {"type": "object", "properties": arguments, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


_INTEGER, _STRING = {"type": "integer"}, {"type": "string"}
BASIC_TOOLS: tuple[Tool, ...] = (
    _tool("timer", "Set a timer", minutes=_INTEGER),
    _tool("note", "Save a note", text=_STRING),
    _tool("move", "Move the robot", side={"enum": ["left", "right"]}, steps=_INTEGER),
    _tool("buy", "Buy items", item=_STRING, count=_INTEGER),
    _tool("lamp", "Switch the lamp", on={"type": "boolean"}),
    _tool("trip", "Book a trip", start=_STRING, end=_STRING),
)
"""Tools of the `tool_call` task."""

REASONING_GYM = (
    "basic_arithmetic",
    "binary_alternation",
    "calendar_arithmetic",
    "caesar_cipher",
    "chain_sum",
    "coin_flip",
    "count_bits",
    "decimal_chain_sum",
    "fraction_simplification",
    "gcd",
    "lcm",
    "leg_counting",
    "letter_counting",
    "number_filtering",
    "number_sequence",
    "prime_factorization",
    "products",
    "simple_equations",
    "spell_backward",
    "time_intervals",
    "word_sequence_reversal",
    "word_sorting",
)
"""Families whose own answers score 1.0, whose verifier never evaluates the answer, and which draw in milliseconds."""

_OPERATORS = {"addition": "+", "subtraction": "-", "multiplication": "*"}


def task_names() -> list[str]:
    """Every name that `get_task` knows, sorted."""
    arithmetic = [f"{kind}_{digits}" for kind in _OPERATORS for digits in range(1, 7)]
    gym = [f"reasoning_gym/{family}" for family in REASONING_GYM]
    return sorted([*arithmetic, *(f"reversed_{name}" for name in arithmetic), *gym, "tool_call"])


@cache
def get_task(name: str) -> Task:
    """The task of a name such as `addition_2`, `reversed_addition_3`, `reasoning_gym/gcd`, `tool_call`.

    Raises:
        UserError: no such task.
    """
    if name not in task_names():
        raise UserError(f"unknown task {name!r}; known: {', '.join(task_names())}")
    if name == "tool_call":
        return ToolCall(name, BASIC_TOOLS)
    if name.startswith("reasoning_gym/"):
        return ReasoningGym(name)
    kind, _, digits = name.removeprefix("reversed_").rpartition("_")
    return Arithmetic(name, _OPERATORS[kind], int(digits), reverse=name.startswith("reversed_"))


def sample_mixture(weights: Mapping[str, float], split: Split, seed: int, index: int) -> Example:
    """Problem `index` of a weighted mixture of tasks: a seeded choice of the task, then its own sample."""
    names = sorted(weights)
    random = Random(f"mixture/{split}/{seed}/{index}")
    name = random.choices(names, [weights[name] for name in names])[0]
    return get_task(name).sample(split_seed(split, seed), index)
