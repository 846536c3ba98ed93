"""When the tensors of a layer live: the rows of `k2.planner.operations`, run forward and backward on byte counts."""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from k2.planner.operations import Form, Layer, Operation

AS_IT_IS = Form()


@dataclass(frozen=True)
class Moment:
    """Bytes at once, and what runs then."""

    bytes: float
    where: str

    def more(self, bytes_: float, where: str) -> "Moment":
        """So many bytes besides, in a part of the model."""
        return Moment(self.bytes + bytes_, f"{where}: {self.where}")


def fullest(moments: Iterable[Moment]) -> Moment:
    """The moment with the most bytes."""
    return max(moments, key=lambda moment: moment.bytes)


class Lifetimes:
    """Which tensors of a layer are alive while each of its operations runs; its input is one of them."""

    def __init__(self, layer: Layer) -> None:
        self._forms, self._operations = layer.forms, layer.operations
        numbered = list(enumerate(layer.operations))
        self.bytes = {"x": layer.operations[-1].makes["output"]}
        for operation in layer.operations:
            self.bytes |= operation.makes
        self._read = {name: number for number, each in numbered for name in (*each.makes, *each.reads)}
        self._needed = {name: number for number, each in reversed(numbered) for name in self._needs(each)}

    def _needs(self, operation: Operation) -> list[str]:
        """The tensors that an operation's backward pass needs, after those that they come from."""
        sources = [name for saved in operation.saves for name in self._form(saved).sources]
        return list(dict.fromkeys((*sources, *operation.saves)))

    def _form(self, name: str) -> Form:
        return self._forms.get(name, AS_IT_IS)

    def _waiting(self, name: str) -> float:
        """Bytes of a saved tensor between the passes."""
        return self._forms[name].kept if name in self._forms else self.bytes[name]

    def kept(self) -> float:
        """Bytes that wait for the backward pass."""
        return sum(self._waiting(name) for name in self._needed)

    def forward(self, keeps: bool) -> Moment:
        """The fullest moment of the forward pass, and whether it keeps what the backward pass needs."""
        alive, moments, coded = {"x": self.bytes["x"]}, [], 0.0
        for number, each in enumerate(self._operations):
            alive |= each.makes
            forms = [self._forms[name] for name in each.makes if name in self._forms]
            coded += sum(form.kept for form in forms)
            most = max((each.forward, *(form.making for form in forms)))
            moments.append(Moment(sum(alive.values()) + coded + most, each.name))
            stays = {name for name in alive if self._read[name] > number or (keeps and name in self._needed)}
            alive = {name: size for name, size in alive.items() if name in stays}
        return fullest(moments)

    def backward(self) -> Moment:
        """The fullest moment of the backward pass."""
        return fullest(_BackwardPass(self).moments(self._operations))

    def brought_back(self, operation: Operation) -> list[tuple[str, Form]]:
        """What an operation's backward pass needs and is not kept as it was."""
        return [(name, self._forms[name]) for name in self._needs(operation) if name in self._forms]

    def saved(self, number: int, back: Container[str]) -> float:
        """Bytes of what the backward passes of operations up to `number` need, some of it back as it was."""
        names = [name for name, last in self._needed.items() if last <= number]
        return sum(self._waiting(name) + self.bytes[name] * (name in back) for name in names)


class _BackwardPass:
    """What is alive besides the saved tensors: those that are back as they were, and gradients.

    A gradient that is passed on is the same memory under other names.
    """

    def __init__(self, life: Lifetimes) -> None:
        self._life = life
        self._back, self._memory, self._weights = set[str](), {"output": "output"}, 0.0

    def moments(self, operations: Sequence[Operation]) -> Iterator[Moment]:
        """One after the other."""
        for number, each in reversed(list(enumerate(operations))):
            for name, form in self._life.brought_back(each):
                if name not in self._back:
                    yield Moment(self._level(number) + form.back, f"{each.name}, {name} again")
                    self._back |= {name, *form.together}
            yield Moment(self._level(number) + each.backward, each.name)
            self._weights += each.gradients
            owners = [self._memory.pop(name) for name in each.makes if name in self._memory]
            for name in each.reads:
                if name in self._memory:
                    yield Moment(self._level(number) + 2 * self._life.bytes[name], f"{each.name}, gradients added up")
                    self._memory[name] = name
                else:
                    self._memory[name] = owners[0] if each.passes else name

    def _level(self, number: int) -> float:
        gradients = sum(self._life.bytes[name] for name in dict.fromkeys(self._memory.values()))
        return self._life.saved(number, self._back) + gradients + self._weights
