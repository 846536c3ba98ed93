"""K2's schedulers for torchx, found by it in this namespace package: `torchx run -s trainjob`, `-s indexed_job`.

No other package may be named `torchx_plugins.schedulers.k2_cluster`, and this folder has no `__init__.py`: other
distributions have modules in it too.
"""

from typing import Any

from torchx.plugins import register

from k2.launch.indexed_job import IndexedJob
from k2.launch.scheduler import JobScheduler
from k2.launch.trainjob import TrainJob


@register.scheduler(name="trainjob")  # type: ignore[untyped-decorator]
def trainjob(session_name: str, **_: Any) -> JobScheduler:
    """TrainJobs of Kubeflow Trainer 2."""
    return JobScheduler("trainjob", session_name, TrainJob())


@register.scheduler(name="indexed_job")  # type: ignore[untyped-decorator]
def indexed_job(session_name: str, **_: Any) -> JobScheduler:
    """Jobs of Kubernetes itself."""
    return JobScheduler("indexed_job", session_name, IndexedJob())
