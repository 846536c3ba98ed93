"""Synthetic application domains: categories, the seed domains of each, and the tools a domain offers.

The categories are those of Kimi K2's report (section 3.1.1, figure 9b). A seed is one line:
name | category | entity | quantity:low-high:increase/decrease | choice:value,value | verb:before>after ...
"""

import random
from dataclasses import dataclass
from typing import Any

from k2.agentic.operations import Operation, Record, State, new_id, parameters
from k2.agentic.tools import ToolSpec

SEEDS = """
banking|financial trading|account|balance:0-900:deposit/withdraw|tier:basic,gold|freeze:open>frozen reopen:frozen>open
stock trading|financial trading|position|shares:0-400:buy/sell|market:spot,margin|close:held>closed
business reports|enterprise BI|dashboard|widgets:0-30:pin/unpin|view:table,chart|publish:draft>public hide:public>draft
parcel delivery|transportation|parcel|weight:1-90:load/unload|speed:normal,express|ship:packed>sent deliver:sent>done
bus fleet|transportation|bus|seats:0-80:free/reserve|line:north,south|depart:parked>moving park:moving>parked
mobile apps|phones|app|storage:0-500:grow/trim|network:wifi,mobile|install:listed>active disable:active>listed
smart lights|smart home|lamp|level:0-100:brighten/dim|colour:warm,cold|switch_on:off>on switch_off:on>off
heating|smart home|room|degrees:5-30:heat/cool|mode:day,night|lock:free>locked unlock:locked>free
flat letting|real estate|flat|rent:100-900:raise_rent/lower_rent|floor:low,high|let:empty>rented vacate:rented>empty
issue tracking|software applications|ticket|votes:0-99:upvote/downvote|priority:low,high|solve:new>solved
backups|software applications|backup|copies:0-20:add_copy/drop_copy|medium:disk,tape|verify:fresh>checked
contracts|legal compliance|contract|pages:1-200:extend/shorten|law:local,foreign|sign:draft>signed cancel:signed>draft
courses|education|course|places:0-60:add_place/take_place|format:online,onsite|start:planned>running end:running>over
robot arm|robot control|joint|angle:0-180:raise/lower|grip:soft,firm|brake:loose>braked release:braked>loose
warehouse robots|robot control|robot|charge:0-100:charge/drain|zone:east,west|dock:roaming>docked undock:docked>roaming
irrigation|agriculture|field|water:0-300:irrigate/drain|crop:maize,wheat|sow:bare>sown harvest:sown>bare
clinic visits|healthcare|visit|minutes:5-90:prolong/cut|kind:check,therapy|confirm:asked>fixed finish:fixed>done
pharmacy|healthcare|drug|stock:0-300:receive/dispense|storage:cool,dry|recall:sold>recalled
work orders|manufacturing|job|units:0-500:add_units/scrap|shift:early,late|begin:queued>running stop:running>queued
server devices|device systems|node|memory:1-256:expand/shrink|role:worker,master|drain_node:up>down boot:down>up
web pages|website control|page|links:0-40:link/unlink|theme:light,dark|publish:hidden>live hide:live>hidden
game guilds|gaming|player|coins:0-999:reward/charge|class:mage,knight|ban:active>banned pardon:banned>active
hotel booking|travel|booking|nights:1-30:add_nights/drop_nights|board:full,half|pay:open>paid refund:paid>open
retail orders|retail|order|items:1-40:add_items/drop_items|delivery:pickup,courier|ship:new>shipped return:shipped>new
"""


@dataclass(frozen=True)
class Quantity:
    """A number a record has, its bounds, and the verbs that increase and decrease it."""

    name: str
    low: int
    high: int
    increase: str
    decrease: str


@dataclass(frozen=True)
class Choice:
    """A field with few values."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Verb:
    """A transition between two statuses."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Domain:
    """An application domain; its tools follow from its fields.

    `limit` and `guard` tighten the quantities' tools (see Operation), `combined` adds tools that change a quantity and
    then the status in one call, and `ancestors` are the names of all domains it descends from.
    """

    name: str
    category: str
    entity: str
    quantities: tuple[Quantity, ...]
    choices: tuple[Choice, ...]
    verbs: tuple[Verb, ...]
    limit: int | None = None
    guard: str | None = None
    combined: tuple[tuple[str, str], ...] = ()
    ancestors: tuple[str, ...] = ()

    @property
    def statuses(self) -> tuple[str, ...]:
        """All statuses a record can have, the first being that of a new record."""
        return tuple(dict.fromkeys(status for verb in self.verbs for status in (verb.before, verb.after)))


def seed_domains() -> list[Domain]:
    """The hand-written domains that evolution starts from."""
    return [_parse(line) for line in SEEDS.split("\n") if line]


def tools_of(domain: Domain) -> list[ToolSpec]:
    """Every tool of a domain: reading, creating, changing fields, transitions and combinations."""
    pairs = [*_record_operations(domain), *_quantity_operations(domain), *_verb_operations(domain)]
    by_name = dict(pairs)
    for first, second in domain.combined:
        operation = by_name[first].model_copy(update={"then": by_name[second]})
        pairs.append((f"{first}_and_{second.removeprefix(domain.entity + '_')}", operation))
    return [
        ToolSpec(
            name=name,
            description=describe(operation),
            parameters=parameters(operation),
            world=f"evolved:{domain.name}",
            category=domain.category,
            operation=operation,
        )
        for name, operation in pairs
    ]


def describe(operation: Operation) -> str:
    """One sentence on what the tool does, limits included."""
    entity, field = operation.entity.replace("_", " "), operation.field
    text = {
        "get": f"Read one {entity}",
        "find": f"List {entity} ids by {field}",
        "create": f"Create one {entity}",
        "remove": f"Remove one {entity}",
        "set": f"Set {field} of one {entity}",
        "adjust": f"{'Increase' if operation.sign > 0 else 'Decrease'} {field} of one {entity}",
        "move": f"Move {field} between two {entity} records",
        "verb": f"Change one {entity} from {' to '.join(operation.values)}",
        "total": f"Sum {field} over every {entity}",
    }[operation.kind]
    if operation.limit:
        text += f", at most {operation.limit} a call"
    if operation.guard:
        text += f", only if {operation.guard}"
    return f"{text}; then {describe(operation.then).lower()}" if operation.then else text


def initial_state(domain: Domain, records: int, rng: random.Random) -> State:
    """A state with `records` random records."""
    made: dict[str, Record] = {}
    while len(made) < records:
        made[new_id(domain.entity, rng)] = _random_record(domain, rng)
    return {domain.entity: dict(sorted(made.items()))}


def _random_record(domain: Domain, rng: random.Random) -> Record:
    record: dict[str, Any] = {"status": rng.choice(domain.statuses)}
    record |= {quantity.name: rng.randint(quantity.low, quantity.high) for quantity in domain.quantities}
    return record | {choice.name: rng.choice(choice.values) for choice in domain.choices}


def _template(domain: Domain) -> Record:
    record: Record = {"status": domain.statuses[0]}
    record |= {quantity.name: quantity.low for quantity in domain.quantities}
    return record | {choice.name: choice.values[0] for choice in domain.choices}


def _record_operations(domain: Domain) -> list[tuple[str, Operation]]:
    entity, choice = domain.entity, domain.choices[0]
    return [
        (f"{entity}_get", Operation(kind="get", entity=entity)),
        (f"{entity}_find", Operation(kind="find", entity=entity, field="status", values=domain.statuses)),
        (
            f"{entity}_create",
            Operation(
                kind="create", entity=entity, field=choice.name, values=choice.values, template=_template(domain)
            ),
        ),
        (f"{entity}_remove", Operation(kind="remove", entity=entity)),
        *(
            (f"{entity}_set_{c.name}", Operation(kind="set", entity=entity, field=c.name, values=c.values))
            for c in domain.choices
        ),
    ]


def _quantity_operations(domain: Domain) -> list[tuple[str, Operation]]:
    entity, pairs = domain.entity, []
    for quantity in domain.quantities:
        change = Operation(
            kind="adjust",
            entity=entity,
            field=quantity.name,
            low=quantity.low,
            high=quantity.high,
            limit=domain.limit,
            guard=domain.guard,
        )
        pairs += [
            (f"{entity}_{quantity.increase}", change),
            (f"{entity}_{quantity.decrease}", change.model_copy(update={"sign": -1})),
            (f"{entity}_move_{quantity.name}", change.model_copy(update={"kind": "move"})),
            (f"{entity}_total_{quantity.name}", Operation(kind="total", entity=entity, field=quantity.name)),
        ]
    return pairs


def _verb_operations(domain: Domain) -> list[tuple[str, Operation]]:
    return [
        (f"{domain.entity}_{verb.name}", Operation(kind="verb", entity=domain.entity, values=(verb.before, verb.after)))
        for verb in domain.verbs
    ]


def _parse(line: str) -> Domain:
    name, category, entity, quantity, choice, verbs = line.split("|")
    quantity_name, bounds, changes = quantity.split(":")
    low, high = bounds.split("-")
    choice_name, values = choice.split(":")
    return Domain(
        name,
        category,
        entity,
        (Quantity(quantity_name, int(low), int(high), *changes.split("/")),),
        (Choice(choice_name, tuple(values.split(","))),),
        tuple(_parse_verb(verb) for verb in verbs.split(" ")),
    )


def _parse_verb(text: str) -> Verb:
    name, change = text.split(":")
    before, after = change.split(">")
    return Verb(name, before, after)
