"""Seeded evolution of domains: each generation mutates and crosses the population (Kimi K2 report, section 3.1.1).

A child is kept when every one of its tools is executable and none of its tool names exists already.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from k2.agentic.domains import Domain, Verb, initial_state, seed_domains, tools_of
from k2.agentic.operations import sample_arguments

QUALIFIERS = ("cold", "late", "mini", "night", "rapid", "royal", "rural", "shared", "solar", "spare", "urban", "vip")
MAX_QUALIFIERS = 2  # names stay readable; more generations would only lengthen them

Mutation = Callable[[Domain, Domain, random.Random], Domain]


def evolve(size: int, seed: int) -> list[Domain]:
    """All seed domains, then accepted descendants of the growing population until there are `size` domains."""
    rng = random.Random(f"evolve/{seed}")
    population = seed_domains()
    taken = {tool.name for domain in population for tool in tools_of(domain)}
    while len(population) < size:
        parents = [domain for domain in population if domain.entity.count("_") < MAX_QUALIFIERS]
        child = _child(rng.choice(parents), rng.choice(population), rng)
        names = {tool.name for tool in tools_of(child)}
        if not names & taken and executable(child, seed):
            population.append(child)
            taken |= names
    return population


def executable(domain: Domain, seed: int) -> bool:
    """Whether each tool of the domain succeeds on some state of it."""
    rng = random.Random(f"check/{seed}/{domain.name}")
    return all(
        any(sample_arguments(tool.operation, initial_state(domain, 6, rng), rng) is not None for _ in range(6))
        for tool in tools_of(domain)
        if tool.operation
    )


def is_descendant(domain: Domain, names: Sequence[str]) -> bool:
    """Whether the domain is one of `names` or has one among its ancestors."""
    return bool({domain.name, *domain.ancestors} & set(names))


def _child(parent: Domain, other: Domain, rng: random.Random) -> Domain:
    mutation = rng.choice(MUTATIONS)
    qualifier = rng.choice(QUALIFIERS)
    child = mutation(parent, other, rng)
    ancestors = {parent.name, *parent.ancestors} | ({other.name, *other.ancestors} if mutation is _cross else set())
    return replace(
        child,
        name=f"{qualifier} {parent.name}",
        entity=f"{qualifier}_{parent.entity}",
        combined=tuple((f"{qualifier}_{first}", f"{qualifier}_{second}") for first, second in child.combined),
        ancestors=tuple(sorted(ancestors)),
    )


def _cross(parent: Domain, other: Domain, rng: random.Random) -> Domain:
    """Take the other domain's quantity or choice into this one."""
    if rng.random() < 0.5:
        known = {quantity.name for quantity in parent.quantities}
        new = [quantity for quantity in other.quantities if quantity.name not in known]
        return replace(parent, quantities=(*parent.quantities, *new))
    known = {choice.name for choice in parent.choices}
    return replace(parent, choices=(*parent.choices, *(c for c in other.choices if c.name not in known)))


def _insert_status(parent: Domain, other: Domain, rng: random.Random) -> Domain:
    """Put a review before one transition: what went a -> b now goes a -> review -> b."""
    verb = rng.choice(parent.verbs)
    if "review" in parent.statuses:
        return parent
    check = Verb(f"check_{verb.name}", verb.before, "review")
    return replace(parent, verbs=(check, *(replace(v, before="review") if v == verb else v for v in parent.verbs)))


def _limit(parent: Domain, other: Domain, rng: random.Random) -> Domain:
    """Cap what one call may change."""
    span = min(quantity.high - quantity.low for quantity in parent.quantities)
    return replace(parent, limit=rng.randint(max(2, span // 8), max(3, span // 3)))


def _guard(parent: Domain, other: Domain, rng: random.Random) -> Domain:
    """Allow quantities to change only in one status."""
    return replace(parent, guard=rng.choice(parent.statuses))


def _combine(parent: Domain, other: Domain, rng: random.Random) -> Domain:
    """Add a tool that changes a quantity and then the status."""
    quantity, verb = rng.choice(parent.quantities), rng.choice(parent.verbs)
    pair = (f"{parent.entity}_{quantity.increase}", f"{parent.entity}_{verb.name}")
    return replace(parent, combined=tuple(dict.fromkeys((*parent.combined, pair))))


MUTATIONS: tuple[Mutation, ...] = (_cross, _insert_status, _limit, _guard, _combine)
