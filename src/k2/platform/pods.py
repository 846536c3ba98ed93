"""What every pod of K2 has, whoever starts it: the environment, labels, and the names of the store's variables."""

from k2.config.deployment import Placement

STORE_KEYS = ("K2_S3_ENDPOINT", "K2_S3_BUCKET", "K2_S3_PREFIX")
CREDENTIALS = ("K2_S3_ACCESS_KEY", "K2_S3_SECRET_KEY")
"""Keys of the store's Secret, named as the variables they become."""

SCRATCH = "/scratch"
CA_FOLDER = "/etc/k2/ca"
LAUNCH_VARIABLE = "K2_LAUNCH"
"""JSON of the `Placement` of a stage that runs as a job; the task that has it launches and follows that job."""

JOBS_VARIABLE = "K2_JOBS"
"""Kinds of jobs that a run may have, with commas between them; the task that has it deletes those still alive."""

POD_VARIABLE = "K2_POD_NAME"
"""The pod's own name: its owner, the workflow, becomes the owner of the jobs that it launches."""

NEEDS_VARIABLE = "K2_NEEDS"
"""JSON of `k2.platform.needs.Needs`; the first step, which has it, finds out whether the cluster has all of it."""

METRICS_TOKEN = "K2_METRICS_TOKEN"
"""The variable that makes pods serve metrics: to those who send its value, on `METRICS_PORT`."""
METRICS_PORT = 9464

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

RUN_LABEL, PRESET_LABEL = "k2.dev/run", "k2.dev/preset"
WORKFLOW_NAME = "{{workflow.name}}"
"""`RUN_LABEL` of a step: Labels reach Argo as arguments of a template, which it fills in; jobs get the same."""

PRESET_VARIABLE = "K2_ONLY_PRESET"
"""The one preset of a deployment's runs: the label is written when the pipeline is rendered, so it must be true."""


def secret_variables(here: Placement) -> dict[str, dict[str, str]]:
    """Secret -> key -> environment variable."""
    keys = STORE_KEYS if here.store.workload_identity else (*STORE_KEYS, *CREDENTIALS)
    found = {here.store.secret: {key: key for key in keys}}
    for variable, secret in here.secrets.items():
        found.setdefault(secret.secret, {})[secret.key] = variable
    return found


def environment(here: Placement) -> dict[str, str]:
    """The variables that say where scratch, CA bundle and proxies are, and how accelerators talk to each other."""
    known = {"HOME": SCRATCH, "TMPDIR": SCRATCH, "K2_HOME": f"{SCRATCH}/k2", "HF_HUB_OFFLINE": "1", **here.pool.nccl}
    if METRICS_TOKEN in here.secrets:
        known |= {"K2_METRICS_PORT": str(METRICS_PORT), "K2_METRICS_HOST": "0.0.0.0"}
    accelerator = here.pool.accelerator
    if accelerator and accelerator.peak_tflops:
        known["K2_PEAK_FLOPS"] = f"{accelerator.peak_tflops * 1e12 * accelerator.count * here.pool.nodes:g}"
    if here.network.ca_config_map:
        bundle = f"{CA_FOLDER}/{here.network.ca_key}"
        known |= dict.fromkeys(("K2_S3_CA", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"), bundle)
    proxies = {"HTTPS_PROXY": here.network.https_proxy, "HTTP_PROXY": here.network.http_proxy}
    used = {name: value for name, value in proxies.items() if value}
    return dict(sorted((known | used | ({"NO_PROXY": here.network.no_proxy} if used else {})).items()))


def labels(here: Placement) -> dict[str, str]:
    """Labels of the pod; a queue admits by one of them, and a mesh's sidecar would keep the pod from ending."""
    known = {"app.kubernetes.io/name": "k2", "app.kubernetes.io/part-of": "k2", "sidecar.istio.io/inject": "false"}
    known |= {"app.kubernetes.io/component": here.task, **here.labels}
    return dict(sorted((known | ({QUEUE_LABEL: here.pool.queue} if here.pool.queue else {})).items()))
