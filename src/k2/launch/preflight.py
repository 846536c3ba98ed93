"""Whether a cluster has and allows what is needed: asked before anything is created there."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from k2.errors import UserError
from k2.launch.cluster import Cluster, ClusterError, Kind
from k2.platform.needs import KUEUE, SORTS, TRAINER, Named, Needs, Rights

log = logging.getLogger(__name__)

INSTALL = {
    TRAINER: "install Kubeflow Trainer 2, or set launch: job",
    KUEUE: "install Kueue, or remove the queue",
}
"""API -> what to do when nothing serves it."""


@dataclass(frozen=True)
class Finding:
    """One check: `absent` is a part that may be missing, `failed` one that may not, `unknown` could not be seen."""

    check: str
    state: Literal["ok", "absent", "unknown", "failed"]
    detail: str


def require(cluster: Cluster, needs: Needs) -> None:
    """Find everything that is missing, at once; what these credentials may not look at is said and let pass.

    Raises:
        UserError: something is missing; each with its field and its fix.
        ClusterError: the API server did not answer.
    """
    served = cluster.served()
    found = [*services(served, needs), *rights(cluster, served, "k2-launcher", needs.rights)]
    found += things(cluster, served, needs)
    for each in found:
        if each.state == "unknown":
            log.warning("%s: %s", each.check, each.detail)
    missing = [f"{each.check}: {each.detail}" for each in found if each.state == "failed"]
    if missing:
        raise UserError("; ".join(missing))


def services(served: set[str], needs: Needs) -> Iterator[Finding]:
    """What nobody serves of what pools need."""
    for field, api in needs.served.items():
        if api not in served:
            yield Finding(field, "failed", f"nothing serves {api}; {INSTALL[api]}")


def rights(cluster: Cluster, served: set[str], role: str, needed: Rights) -> Iterator[Finding]:
    """Whether these credentials may do all this, for each resource that is served."""
    groups = {api.partition("/")[0] for api in served}
    for group, resource, verbs in needed:
        if group and group not in groups:
            continue
        name = f"{resource}.{group}" if group else resource
        missing = [verb for verb in verbs if not cluster.allows(group, resource, verb)]
        detail = f"missing: {', '.join(missing)}; the Role {role} grants them" if missing else ", ".join(verbs)
        yield Finding(f"may {name} in {cluster.namespace}", "failed" if missing else "ok", detail)


def things(cluster: Cluster, served: set[str], needs: Needs) -> Iterator[Finding]:
    """Whether each named object is there with its keys, where its API is served."""
    for each in needs.named:
        if SORTS[each.sort].api in served:
            yield _looked_up(cluster, each)


def _looked_up(cluster: Cluster, each: Named) -> Finding:
    sort, check = SORTS[each.sort], f"{each.sort} {each.name}"
    try:
        found = cluster.get(Kind(sort.api, sort.plural, sort.namespaced), each.name)
    except ClusterError as error:
        if error.status != 403:
            raise
        detail = f"these credentials may not look for it ({each.field}); with the verb get on {sort.plural} they can"
        return Finding(check, "unknown", detail)
    place = f" in {cluster.namespace}" if sort.namespaced else ""
    if found is None:
        return Finding(check, "failed", f"there is none{place}, and {each.field} names it; {sort.fix}")
    missing = sorted(set(each.keys) - set(found.get("data") or ()))
    if missing:
        return Finding(check, "failed", f"has no {', '.join(missing)}, which {each.field} needs; add what is missing")
    return Finding(check, "ok", f"is there{place}")
