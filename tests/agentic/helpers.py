"""Tasks in a synthetic domain, built by hand or at random, and environments over them."""

import random

from k2.agentic.agents import TaskShape, domain_task
from k2.agentic.dialog import DialogEnvironment
from k2.agentic.domains import seed_domains, tools_of
from k2.agentic.simulator import SimulatedWorld
from k2.agentic.tasks import Agent, Call, Checkpoint, Goal, Persona, Rubric, Task
from k2.config.synthesize import FaultRates

CALM = FaultRates(error=0, timeout=0, partial=0)
SHAPE = TaskShape(min_tools=1, max_tools=3, records=3, max_goals=2, max_difficulty=3)


def environment(rates: FaultRates = CALM, max_turns: int = 20) -> DialogEnvironment:
    return DialogEnvironment(SimulatedWorld, rates, max_turns)


def random_tasks(count: int, seed: int = 0, shape: TaskShape = SHAPE) -> list[Task]:
    rng = random.Random(seed)
    return [domain_task(rng.choice(seed_domains()), shape, f"t{index}", rng) for index in range(count)]


def deposit_task(**changes: object) -> Task:
    """The user wants 30 deposited on a1, and says how much only when asked."""
    banking = next(domain for domain in seed_domains() if domain.name == "banking")
    tools = {tool.name: tool for tool in tools_of(banking)}
    record = {"status": "open", "balance": 40, "tier": "basic"}
    call = Call(tool="account_deposit", arguments={"id": "a1", "amount": 30}, effect={**record, "balance": 70})
    task = Task(
        id="deposit",
        world="evolved:banking",
        difficulty=2,
        agent=Agent(system="You run banking.", tools=(tools["account_deposit"], tools["account_get"])),
        persona=Persona(name="Ada", style="plain"),
        goals=(
            Goal(
                request="increase the balance of account a1",
                question=False,
                calls=(call,),
                missing="amount",
                detail="30",
            ),
        ),
        initial={"account": {"a1": record, "a2": {**record, "balance": 5}}},
        rubric=Rubric(
            changes={"account.a1.balance": 70},
            keeps={
                "account.a1.status": "open",
                "account.a1.tier": "basic",
                "account.a2.balance": 5,
                "account.a2.status": "open",
                "account.a2.tier": "basic",
            },
            checkpoints=(Checkpoint(before="account_deposit", event="question"),),
        ),
    )
    return task.model_copy(update=changes)
