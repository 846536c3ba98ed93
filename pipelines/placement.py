"""Where and how a task runs in a cluster: resources, time limit, security, credentials by secret name."""

from dataclasses import dataclass

from kfp import kubernetes
from kfp.dsl import PipelineTask

from k2.execution.registry import STAGES

SECRET_KEYS = {
    name: name for name in ("K2_S3_ENDPOINT", "K2_S3_BUCKET", "K2_S3_PREFIX", "K2_S3_ACCESS_KEY", "K2_S3_SECRET_KEY")
}


@dataclass(frozen=True)
class Needs:
    """What one task asks for: CPU cores, memory, hours before it is stopped."""

    cpu: str
    memory: str
    hours: float


LIGHT = Needs("500m", "1Gi", 1)
DATA = Needs("2", "4Gi", 12)
TRAIN = Needs("2", "4Gi", 24)
NEEDS = {
    "corpus": DATA,
    "ingest": DATA,
    "rephrase": TRAIN,
    "tokenize": DATA,
    "pretrain": TRAIN,
    "synthesize": DATA,
    "sft": TRAIN,
    "rl": TRAIN,
    "quantize": TRAIN,
    "export": DATA,
    "evaluate": TRAIN,
}
UID = 1000


def place(task: PipelineTask, name: str) -> PipelineTask:
    """Give a task its display name, resources, time limit, non-root user and the store's secret; KFP's cache is off.

    K2's own cache compares content digests and checks that the artifact still exists; KFP's does neither.
    """
    needs = NEEDS.get(name, LIGHT)
    title = STAGES[name].title if name in STAGES else "Validate the configuration"
    task.set_display_name(title).set_caching_options(False)
    task.set_cpu_request(needs.cpu).set_memory_request(needs.memory).set_memory_limit(needs.memory)
    kubernetes.set_timeout(task, seconds=int(needs.hours * 3600))
    kubernetes.set_security_context(task, run_as_user=UID, run_as_group=UID, run_as_non_root=True)
    kubernetes.use_secret_as_env(task, secret_name="k2-s3", secret_key_to_env=SECRET_KEYS)
    return task
