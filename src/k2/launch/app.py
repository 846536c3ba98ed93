"""One torchx application per stage: what runs, on how many nodes, with what. Any scheduler of torchx takes it.

    torchx run -s local_cwd k2.launch.app.stage --processes 2 -- pretrain --preset nano
    torchx run -s trainjob -cfg namespace=ml,queue=gpu k2.launch.app.stage --deployment FILE -- sft --preset small

The schedulers `trainjob` and `indexed_job` are K2's own (`torchx_plugins.schedulers`); `kubernetes` is torchx's, for
Volcano; `local_cwd` starts processes here.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torchx.specs import AppDef, AppDryRunInfo, Resource, Role, macros

from k2.config.deployment import DISTRIBUTED, Deployment, Placement
from k2.config.quantity import amount
from k2.launch.pod import CONTAINER, restricted, template, with_program
from k2.platform.pods import PRESET_LABEL, environment

POD = "pod"
"""Key of the pod template in a role's metadata."""

GPU = "nvidia.com/gpu"
PORT = 29500
"""Where rank 0 of a job of several nodes waits for the others."""


@dataclass
class NodeRole(Role):  # type: ignore[misc]
    """A role whose pods are as `k2.launch.pod` makes them, with torchx's own scheduler for Volcano too."""

    def pre_proc(self, scheduler: str, dryrun_info: AppDryRunInfo[Any, Any]) -> AppDryRunInfo[Any, Any]:
        """Called by torchx with what it is about to submit."""
        if scheduler == "kubernetes":
            for task in dryrun_info.request.resource["spec"]["tasks"]:
                task["template"] = _hardened(task["template"], pod_of(self))
        elif scheduler.startswith("local"):
            # The image's `python` is the interpreter that torchx runs in, whether or not it is on PATH.
            for replica in dryrun_info.request.role_params[self.name]:
                replica.args[0] = sys.executable
        return dryrun_info


def application(
    name: str, here: Placement, arguments: Sequence[str], variables: Mapping[str, str] | None = None
) -> AppDef:
    """The application that runs a module, `arguments` being its name and what it takes, on all nodes of a placement.

    Stages that are not distributed run as one process.
    """
    pool, many = here.pool, here.task in DISTRIBUTED
    processes = pool.accelerator.count if many and pool.accelerator else 1
    role = _role(pool.nodes if many else 1, processes, arguments)
    role.image, role.resource, role.metadata = here.image, _resource(here), {POD: template(here)}
    role.env = environment(here) | dict(variables or {})
    return AppDef(name, [role], dict(template(here)["metadata"]["labels"]))


def stage(*arguments: str, deployment: str | None = None, name: str = "k2", processes: int = 1) -> AppDef:
    """A stage as `k2` runs it, in several processes.

    Args:
        arguments: a stage and its options, such as: pretrain --preset small
        deployment: deployment file that says where the stage runs; without one it is this machine
        name: name of the application
        processes: processes on this machine, without a deployment file
    """
    command = ["k2.cli", *arguments]
    if deployment is not None:
        from k2.platform.documents import read_section

        app = application(name, read_section(Path(deployment), Deployment).placement(arguments[0]), command)
        app.metadata[PRESET_LABEL] = _preset(arguments)
        return app
    role = _role(1, processes, command)
    role.resource = Resource(cpu=processes, gpu=0, memMB=2048 * processes)
    return AppDef(name, [role])


def pod_of(role: Role) -> dict[str, Any]:
    """The pod template of a role; of one that K2 did not make, a restricted pod and nothing more."""
    pod: dict[str, Any] = role.metadata.get(POD) or restricted(None, None)
    return pod


def resources_of(role: Role) -> dict[str, dict[str, str]]:
    """Requests and limits of a node: the same, so that nothing of a rank is taken away when others are busy."""
    asked = role.resource
    known = {"cpu": f"{round(1000 * asked.cpu)}m" if asked.cpu > 0 else "", "memory": f"{asked.memMB}Mi"}
    known |= {GPU: str(asked.gpu) if asked.gpu > 0 else ""} | {
        name: str(n) for name, n in sorted(asked.devices.items())
    }
    wanted = {name: value for name, value in known.items() if value}
    return {"requests": wanted, "limits": dict(wanted)}


def _preset(arguments: Sequence[str]) -> str:
    """The preset of a command line of `k2`; its own default where none is named."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="tiny")
    return str(parser.parse_known_args(arguments)[0].preset)


def _role(nodes: int, processes: int, arguments: Sequence[str]) -> NodeRole:
    """`macros` are filled in by the scheduler: which node this is, and the variable that names the first one."""
    meet = ["--nodes", str(nodes), "--node", macros.replica_id, "--host-in", macros.rank0_env, "--port", str(PORT)]
    return NodeRole(
        name=CONTAINER,
        image="",
        entrypoint="python",
        args=["-m", "k2.launch.node", *meet, "--processes", str(processes), "--", *arguments],
        num_replicas=nodes,
        port_map={"rendezvous": PORT} if nodes > 1 else {},
    )


def _resource(here: Placement) -> Resource:
    """CPU, memory and devices of one node."""
    pool = here.pool
    devices = dict(pool.rdma)
    if pool.accelerator and pool.accelerator.resource != GPU:
        devices[pool.accelerator.resource] = pool.accelerator.count
    gpus = pool.accelerator.count if pool.accelerator and pool.accelerator.resource == GPU else 0
    # Declared as a whole number, but schedulers ask for thousandths.
    cpu = cast(int, amount(pool.cpu))
    return Resource(cpu=cpu, gpu=gpus, memMB=int(-(-pool.memory_bytes() // 2**20)), devices=devices)


def _hardened(pod: Any, ours: Mapping[str, Any]) -> dict[str, Any]:
    """What torchx made for Volcano, in a pod of ours: torchx knows neither secrets nor restrictions."""
    from kubernetes.client import ApiClient  # type: ignore[import-untyped]

    theirs = ApiClient().sanitize_for_serialization(pod)
    given = theirs["spec"]["containers"][0]
    given.pop("volumeMounts"), given.pop("securityContext")
    return with_program(ours, given, theirs["metadata"]["labels"])
