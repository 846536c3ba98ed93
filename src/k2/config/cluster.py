"""A cluster as the planner sees it: hardware constants, prices and failure rates, each with its source."""

from typing import Any, Self

from pydantic import Field, model_validator

from k2.config.base import Section, setting


class Accelerator(Section):
    """One GPU. GB are 1e9 bytes."""

    name: str = setting(..., "what it is called")
    memory_gb: float = setting(..., "memory", gt=0)
    reserved_gb: float = setting(..., "memory that the driver, the communicator and fragmentation take", ge=0)
    bf16_tflops: float = setting(..., "dense bfloat16 peak, 1e12 operations per second", gt=0)
    memory_gb_s: float = setting(..., "bandwidth of its memory", gt=0)
    pcie_gb_s: float = setting(..., "bandwidth to the host, one direction", gt=0)
    efficiency: float = setting(..., "share of the peak that the model's matrix products reach", gt=0, le=1)
    newton_schulz_efficiency: float = setting(..., "share of the peak that Newton-Schulz reaches", gt=0, le=1)

    @model_validator(mode="after")
    def _something_left(self) -> Self:
        if self.reserved_gb >= self.memory_gb:
            raise ValueError(f"reserved_gb ({self.reserved_gb:g}) must be less than memory_gb ({self.memory_gb:g})")
        return self


class Network(Section):
    """How GPUs talk; bandwidths of one GPU in one direction."""

    local_gb_s: float = setting(..., "within a node", gt=0)
    remote_gb_s: float = setting(..., "between nodes", gt=0)
    efficiency: float = setting(..., "share of the bandwidth that collectives reach", gt=0, le=1)


class Storage(Section):
    """The object store."""

    write_gb_s: float = setting(..., "all ranks together", gt=0)
    read_gb_s: float = setting(..., "all ranks together", gt=0)


class Reliability(Section):
    """How often something breaks."""

    gpu_hours_between_failures: float = setting(..., "GPU-hours until a job stops unexpectedly, on average", gt=0)
    restart_minutes: float = setting(..., "from a failure to the next step, loading the checkpoint left out", ge=0)


class Cluster(Section):
    """The whole; every field needs a value and an entry in `sources`."""

    name: str = setting(..., "what it is called")
    nodes: int = setting(..., "number of nodes", ge=1)
    gpus_per_node: int = setting(..., "GPUs of one node", ge=1)
    host_memory_gb: float = setting(..., "memory of one node's host", gt=0)
    gpu: Accelerator
    network: Network
    storage: Storage
    reliability: Reliability
    price_per_gpu_hour: float = setting(..., "in `currency`", ge=0)
    currency: str = setting("USD", "of the price")
    sources: dict[str, str] = Field(
        description="dotted field -> where its value comes from; a section covers its fields"
    )

    @property
    def gpus(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus_per_node

    @model_validator(mode="after")
    def _sourced(self) -> Self:
        known = dict(_leaves(self.model_dump(exclude={"sources", "name", "currency"})))
        known.pop("gpu.name")
        for path in known:
            parents = {path.rsplit(".", n)[0] for n in range(path.count(".") + 1)}
            if not parents & set(self.sources):
                raise ValueError(f"sources: {path} has none; say where its value comes from")
        return self


def _leaves(values: dict[str, Any], prefix: str = "") -> Any:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
