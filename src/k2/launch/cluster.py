"""The part of the Kubernetes API that launching needs: plain JSON objects, and failures of the server waited out."""

import json
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubernetes import client, config  # type: ignore[import-untyped]
from urllib3.exceptions import HTTPError

from k2.errors import StageError, UserError

log = logging.getLogger(__name__)

Object = dict[str, Any]
"""A Kubernetes object as JSON."""

TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses of an API server that is busy, restarting, or waiting for a webhook."""

PATIENCE_S = 1800.0
"""Seconds without a usable answer before giving up; the work itself goes on meanwhile."""

REQUEST_TIMEOUT_S = 30.0
FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 15.0
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ClusterError(StageError):
    """The API server refused a request, or did not answer for too long (`status` is then 0)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Kind:
    """One kind of objects: its API and the word in URLs."""

    api: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str, name: str = "", sub: str = "") -> str:
        """The URL's path, of one object or of all in the namespace."""
        base = f"/api/{self.api}" if "/" not in self.api else f"/apis/{self.api}"
        place = f"namespaces/{namespace}" if self.namespaced else ""
        return "/".join(part for part in (base, place, self.plural, name, sub) if part)


PODS = Kind("v1", "pods")
CONFIG_MAPS = Kind("v1", "configmaps")
SERVICES = Kind("v1", "services")
JOBS = Kind("batch/v1", "jobs")
TRAIN_JOBS = Kind("trainer.kubeflow.org/v1alpha1", "trainjobs")
WORKLOADS = Kind("kueue.x-k8s.io/v1beta2", "workloads")
WORKFLOWS = Kind("argoproj.io/v1alpha1", "workflows")
REVIEWS = Kind("authorization.k8s.io/v1", "selfsubjectaccessreviews", namespaced=False)


class Cluster:
    """One namespace of a cluster. Methods raise `ClusterError`."""

    def __init__(self, api: client.ApiClient, namespace: str, patience_s: float = PATIENCE_S) -> None:
        self.api, self.namespace, self.patience_s = api, namespace, patience_s

    @classmethod
    def connect(cls, namespace: str | None = None, patience_s: float = PATIENCE_S) -> "Cluster":
        """The cluster of the service account, else of the kubeconfig; by default the pod's own namespace.

        Raises:
            UserError: no credentials, or no namespace.
        """
        found = namespace or (NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.exists() else None)
        if found is None:
            raise UserError("namespace: say which one, for this is not a pod of a cluster")
        return cls(connect(), found, patience_s)

    def get(self, kind: Kind, name: str) -> Object | None:
        """One object, or None."""
        try:
            found: Object = self._json("GET", kind.path(self.namespace, name))
            return found
        except ClusterError as error:
            if error.status == 404:
                return None
            raise

    def list(self, kind: Kind, labels: Mapping[str, str] | None = None) -> list[Object]:
        """The objects with all these labels, by name."""
        selector = ",".join(f"{key}={value}" for key, value in sorted((labels or {}).items()))
        query = {"labelSelector": selector} if selector else {}
        found = self._json("GET", kind.path(self.namespace), query=query)["items"]
        return sorted(found, key=lambda each: str(each["metadata"]["name"]))

    def create(self, kind: Kind, body: Object) -> Object:
        """A new object; status 409 when there is one of its name, perhaps by a request whose answer was lost."""
        made: Object = self._json("POST", kind.path(self.namespace), body)
        return made

    def delete(self, kind: Kind, name: str) -> None:
        """Remove an object with all that it owns; one that is gone is no error."""
        options = {"propagationPolicy": "Foreground"}
        try:
            self._json("DELETE", kind.path(self.namespace, name), options)
        except ClusterError as error:
            if error.status != 404:
                raise

    def version(self) -> str:
        """The API server's own."""
        return str(self._json("GET", "/version/")["gitVersion"])

    def served(self) -> set[str]:
        """Every API group with its versions, and `v1`."""
        groups = self._json("GET", "/apis/")["groups"]
        return {version["groupVersion"] for group in groups for version in group["versions"]} | {"v1"}

    def allows(self, group: str, resource: str, verb: str) -> bool:
        """Whether these credentials may do something here; `resource` may have a part, such as pods/log."""
        kind, _, part = resource.partition("/")
        wanted = {"namespace": self.namespace, "verb": verb, "group": group, "resource": kind, "subresource": part}
        body = {"apiVersion": REVIEWS.api, "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": wanted}}
        return bool(self.create(REVIEWS, body)["status"]["allowed"])

    def log(self, pod: str, container: str, since: str | None) -> str:
        """What a container wrote, each line after its time; from `since` on, a time to the second.

        Asked once: the server fails for as long as the pod's node is away.
        """
        query = {"container": container, "timestamps": "true"} | ({"sinceTime": since} if since else {})
        path = PODS.path(self.namespace, pod, "log")
        return self._request("GET", path, None, query, patience_s=0.0).decode(errors="replace")

    def output(self, pod: str, container: str, limit_bytes: int) -> bytes:
        """The beginning of what a container wrote."""
        query = {"container": container, "limitBytes": str(limit_bytes)}
        return self._request("GET", PODS.path(self.namespace, pod, "log"), None, query, self.patience_s)

    def _json(self, method: str, path: str, body: Object | None = None, query: Mapping[str, str] | None = None) -> Any:
        return json.loads(self._request(method, path, body, query or {}, self.patience_s))

    def _request(
        self, method: str, path: str, body: Object | None, query: Mapping[str, str], patience_s: float
    ) -> bytes:
        """Repeat a request while the server fails, at growing intervals."""
        deadline, delay = time.monotonic() + patience_s, FIRST_DELAY_S
        while True:
            try:
                return self._once(method, path, body, query)
            except client.ApiException as error:
                status, problem = int(error.status or 0), _reason(error)
                if status not in TRANSIENT:
                    raise ClusterError(_explained(status, problem, method, path), status) from None
            except (HTTPError, OSError) as error:
                status, problem = 0, type(error).__name__
            if time.monotonic() + delay > deadline:
                waited = f", for {patience_s:g} s" if patience_s else ""
                raise ClusterError(f"{self.api.configuration.host}: {problem}{waited}", status)
            log.warning("%s %s: %s; asked again in %.1f s", method, path, problem, delay)
            time.sleep(delay * random.uniform(0.8, 1.2))
            delay = min(2 * delay, LONGEST_DELAY_S)

    def _once(self, method: str, path: str, body: Object | None, query: Mapping[str, str]) -> bytes:
        response = self.api.call_api(
            path,
            method,
            query_params=list(query.items()),
            header_params={"Accept": "*/*", "Content-Type": "application/json"},
            body=body,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _return_http_data_only=True,
            _request_timeout=REQUEST_TIMEOUT_S,
        )
        data: bytes = response.data
        return data


def connect(user: str | None = None) -> client.ApiClient:
    """A client with the service account's credentials, else the kubeconfig's; as another user when one is named.

    Raises:
        UserError: there are none.
    """
    try:
        config.load_incluster_config()
    except config.ConfigException:
        try:
            config.load_kube_config()
        except config.ConfigException as error:
            raise UserError(f"no credentials for a cluster: {error}; set KUBECONFIG or run inside one") from None
    settings = client.Configuration.get_default_copy()
    settings.retries = False
    api = client.ApiClient(settings)
    if user:
        api.set_default_header("Impersonate-User", user)
    return api


def _explained(status: int, problem: str, method: str, path: str) -> str:
    fix = {
        401: "; the credentials are not valid",
        403: "; the Role k2-launcher grants what a launcher does, and `k2 doctor --cluster` names what is missing",
        404: "; is what serves it installed?",
    }
    return f"{method} {path}: {problem}{fix.get(status, '')}"


def _reason(error: client.ApiException) -> str:
    """What the server says about a refused request, in one line."""
    try:
        message = json.loads(error.body)["message"]
    except (KeyError, TypeError, ValueError):
        message = error.reason
    return f"HTTP {error.status}: {' '.join(str(message).split())[:300]}"
