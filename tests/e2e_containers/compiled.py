"""Run a compiled pipeline with kfp's DockerRunner; reads a `Request` as JSON from stdin.

Each step's container is as a cluster would have it: not root, a read-only root file system, no capability, no way out.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass

from kfp import components, local

SCRATCH = ("/tmp", "/scratch")


@dataclass(frozen=True)
class Request:
    """What to run: the IR file, where its outputs go, the network it is on, parameters, and the steps' environment."""

    file: str
    root: str
    network: str
    parameters: dict[str, str]
    environment: dict[str, str]

    def json(self) -> str:
        """For stdin."""
        return json.dumps(asdict(self))


def main(request: Request) -> None:
    """Raises whatever kfp raises when a step fails."""
    # kfp makes folders that steps write to as another user.
    os.umask(0)
    runner = local.DockerRunner(
        entrypoint=[],
        user="1000:1000",
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        tmpfs=dict.fromkeys(SCRATCH, ""),
        network=request.network,
        environment=request.environment,
    )
    local.init(runner, pipeline_root=request.root)
    components.load_component_from_file(request.file)(**request.parameters)


if __name__ == "__main__":
    main(Request(**json.load(sys.stdin)))
