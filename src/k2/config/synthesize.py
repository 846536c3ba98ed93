"""Configuration of the synthesize stage; torch-free."""

from typing import Literal, Self

from pydantic import model_validator

from k2.config.base import Section, StageSection, setting
from k2.config.generator import GeneratorConfig

ServerName = Literal["git", "time"]


class FaultRates(Section):
    """How often the tool simulator misbehaves, per call."""

    error: float = setting(0.05, "probability that the service refuses for now", ge=0, le=1)
    timeout: float = setting(0.05, "probability that a call times out without effect", ge=0, le=1)
    partial: float = setting(0.05, "probability that the work is done but its confirmation is lost", ge=0, le=1)

    @model_validator(mode="after")
    def _is_a_distribution(self) -> Self:
        if self.error + self.timeout + self.partial > 1:
            raise ValueError("error + timeout + partial must be at most 1")
        return self


class SynthesizeConfig(StageSection):
    """Agentic data: tools, agents, tasks, trajectories, judge (Kimi K2 report, section 3.1.1)."""

    domains: int = setting(2000, "synthetic domains, about a dozen tools each: 24 seeds and what evolves", ge=24)
    heldout_domains: tuple[str, ...] = setting(
        ("heating", "parcel delivery", "issue tracking"),
        "seed domains kept for evaluation, with everything that evolves from them",
    )
    servers: tuple[ServerName, ...] = setting(("git", "time"), "real MCP servers to start over stdio")
    heldout_servers: tuple[ServerName, ...] = setting(("time",), "MCP servers kept for evaluation")
    terse: bool = setting(False, "short system prompts, MCP declarations of required parameters: for short contexts")
    tasks: int = setting(50000, "training tasks, one trajectory each", ge=1)
    heldout_tasks: int = setting(1000, "tasks on held-out domains and servers, written for evaluation", ge=0)
    mcp_share: float = setting(0.15, "share of tasks that run on real MCP servers", ge=0, le=1)
    min_tools: int = setting(1, "fewest tools an agent has", ge=1)
    max_tools: int = setting(8, "most tools an agent has", ge=1)
    records: int = setting(6, "records in the initial state of a synthetic world", ge=2, le=60)
    max_goals: int = setting(4, "most goals a user has in one dialog", ge=1)
    max_difficulty: int = setting(3, "1: plain calls; 2: questions and values read first; 3: follow-ups", ge=1, le=3)
    max_turns: int = setting(24, "assistant messages after which a dialog is cut off", ge=2)
    max_chars: int | None = setting(None, "longest rendered dialog that is accepted; null for no bound", ge=200)
    faults: FaultRates = setting(FaultRates(), "what the tool simulator injects")
    mistake_rate: float = setting(0.35, "share of reference trajectories with one mistake to be judged", ge=0, le=1)
    recovery_rate: float = setting(
        0.5, "probability that the planner corrects a mistake a tool has reported", ge=0, le=1
    )
    generator: GeneratorConfig | None = setting(None, "the model that acts; null for the reference planner")
    temperature: float = setting(1.0, "sampling temperature of the acting model", ge=0)
    max_tokens: int = setting(1024, "tokens of one assistant message of the acting model", ge=8)
    shard: int = setting(64, "trajectories made and saved together; a restart loses one at most", semantic=False, ge=1)
    call_timeout_s: float = setting(60.0, "seconds an MCP server has to start or to answer", semantic=False, gt=0)

    @model_validator(mode="after")
    def _something_is_left_to_train_on(self) -> Self:
        if not set(self.heldout_servers) <= set(self.servers):
            raise ValueError(f"heldout_servers {self.heldout_servers} must be among servers {self.servers}")
        if self.mcp_share and set(self.servers) == set(self.heldout_servers):
            raise ValueError("mcp_share must be 0 when every server is held out")
        if self.min_tools > self.max_tools:
            raise ValueError(f"min_tools ({self.min_tools}) must be at most max_tools ({self.max_tools})")
        return self
