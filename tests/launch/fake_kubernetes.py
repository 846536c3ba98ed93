"""A Kubernetes API server on loopback: objects with uids and owners, label selectors, logs, and failures on demand.

It knows nothing of kinds. Where `kubelet` is set, it also does what the Job controller and a node would: it starts the
pods of Jobs that are not suspended as processes of this machine.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Object = dict[str, Any]
OBJECT = re.compile(
    r"(?P<base>/api/v1|/apis/[^/]+/[^/]+)(/namespaces/(?P<ns>[^/]+))?/(?P<plural>[^/]+)(/(?P<name>[^/]+))?"
)
SERVED = (
    *("argoproj.io/v1alpha1", "batch/v1", "kueue.x-k8s.io/v1beta2", "node.k8s.io/v1"),
    "trainer.kubeflow.org/v1alpha1",
)
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


@dataclass
class Failure:
    """The next `times` requests of a method whose path matches get a status, or (0) no answer at all.

    `after`: the request is done before its answer is lost.
    """

    method: str
    path: str
    status: int
    times: int = 1
    after: bool = False


@dataclass
class Kubelet:
    """Runs pods as processes: the image's `python` is this one; names in the Service are this machine."""

    environment: dict[str, str] = field(default_factory=dict)
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)


class FakeKubernetes(ThreadingHTTPServer):
    """objects: path -> object; logs: pod -> lines with their time; requests: method and path of every request.

    served: APIs; forbidden: what nobody may touch; denied: verb and resource that reviews of access refuse.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, Object] = {}
        self.logs: dict[str, list[tuple[str, str]]] = {}
        self.failures: list[Failure] = []
        self.requests: list[tuple[str, str]] = []
        self.served = list(SERVED)
        self.forbidden: set[str] = set()
        self.denied: set[tuple[str, str]] = set()
        self.lock = threading.RLock()
        self.kubelet: Kubelet | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def of(self, plural: str) -> list[Object]:
        """All objects of a kind, by name."""
        with self.lock:
            return [body for path, body in sorted(self.objects.items()) if path.split("/")[-2] == plural]

    def add(self, path: str, body: Object) -> Object:
        """Put an object there, as somebody else would."""
        with self.lock:
            metadata = {"uid": uuid.uuid4().hex, "creationTimestamp": now(), "resourceVersion": "1"}
            name = body["metadata"]["name"]
            self.objects[f"{path}/{name}"] = body | {"metadata": metadata | body["metadata"]}
            return self.objects[f"{path}/{name}"]

    def remove(self, path: str) -> None:
        """Remove an object and all that it owns."""
        with self.lock:
            gone = self.objects.pop(path)["metadata"]["uid"]
            owned = [each for each, body in self.objects.items() if gone in owners(body)]
            for each in owned:
                if each in self.objects:
                    self.remove(each)

    def status(self, name: str, **status: Any) -> None:
        """Set the status of the object of a name, and what belongs to it in its spec."""
        with self.lock:
            (body,) = [each for each in self.objects.values() if each["metadata"]["name"] == name and "spec" in each]
            body["status"] = status

    def write(self, pod: str, *lines: str, at: str | None = None) -> None:
        """Add to a pod's log."""
        with self.lock:
            self.logs.setdefault(pod, []).extend((at or now(nanoseconds=True), line) for line in lines)

    def start(self, path: str, job: Object) -> None:
        """Run a Job's pods."""
        threading.Thread(target=self._run_job, args=(path, job), daemon=True).start()

    def _run_job(self, path: str, job: Object) -> None:
        name, count = job["metadata"]["name"], job["spec"]["completions"]
        base = path.split("/namespaces/")[1].split("/")[0]
        job["status"] = {"active": count, "ready": count}
        threads = []
        codes: list[int] = [0] * count
        for index in range(count):
            annotations = {"batch.kubernetes.io/job-completion-index": str(index)} if count > 1 else {}
            template = job["spec"]["template"]
            metadata = {"name": f"{name}-{index}-abcde", "annotations": annotations, "labels": {"job-name": name}}
            owner = {"kind": "Job", "name": name, "uid": job["metadata"]["uid"]}
            pod = self.add(
                f"/api/v1/namespaces/{base}/pods",
                {"metadata": metadata | {"ownerReferences": [owner]}, "spec": template["spec"]},
            )
            thread = threading.Thread(target=self._run_pod, args=(pod, index, codes), daemon=True)
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join()
        ended = {"type": "Failed", "reason": "PodFailurePolicy"} if any(codes) else {"type": "Complete"}
        job["status"] = {"conditions": [ended | {"status": "True"}], "succeeded": codes.count(0)}

    def _run_pod(self, pod: Object, index: int, codes: list[int]) -> None:
        assert self.kubelet is not None
        container = pod["spec"]["containers"][0]
        plain = {each["name"]: each["value"] for each in container["env"] if "value" in each}
        for each in container["env"]:
            if "valueFrom" in each:
                plain[each["name"]] = os.environ[each["valueFrom"]["secretKeyRef"]["key"]]
        plain |= {"K2_RANK0_HOST": "127.0.0.1"} | self.kubelet.environment
        arguments = [each.replace("$(JOB_COMPLETION_INDEX)", str(index)) for each in container["args"]]
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)} | plain,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.kubelet.processes.append(process)
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                self.write(pod["metadata"]["name"], line.decode().rstrip("\n"))
        codes[index] = process.returncode


class Handler(BaseHTTPRequestHandler):
    """REST as kube-apiserver speaks it, as far as launching needs it."""

    server: FakeKubernetes
    protocol_version = "HTTP/1.1"
    # Head and body of an answer are two writes; the second would wait 40 ms for the first's acknowledgement.
    disable_nagle_algorithm = True

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        url = urlsplit(self.path)
        self.server.requests.append((self.command, url.path))
        failure = self._failure(url.path)
        if failure and not failure.after:
            self._fail(failure.status)
            return
        with self.server.lock:
            status, answer = self._answer(url.path, {k: v[0] for k, v in parse_qs(url.query).items()}, body)
        if failure:
            self._fail(failure.status)
        else:
            self._send(status, answer)

    do_GET = do_POST = do_DELETE = handle_any

    def _failure(self, path: str) -> Failure | None:
        for each in self.server.failures:
            if each.times > 0 and each.method == self.command and re.search(each.path, path):
                each.times -= 1
                return each
        return None

    def _fail(self, status: int) -> None:
        if status:
            self._send(status, problem(status, "injected"))
        else:
            self.close_connection = True

    def _answer(self, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        if path.endswith("/log"):
            return self._log(path, query)
        if path == "/apis/":
            return 200, {"groups": [{"versions": [{"groupVersion": each}]} for each in self.server.served]}
        if path == REVIEWS:
            return 201, body | {"status": {"allowed": self._allowed(body["spec"]["resourceAttributes"])}}
        match = OBJECT.fullmatch(path)
        if match is None:
            return 404, problem(404, "no such resource")
        if match["plural"] in self.server.forbidden:
            return 403, problem(403, f"{match['plural']} is forbidden")
        collection = path if not match["name"] else path.rpartition("/")[0]
        if self.command == "POST":
            return self._create(collection, body)
        if not match["name"]:
            return 200, {"items": self._selected(collection, query.get("labelSelector", ""))}
        if path not in self.server.objects:
            return 404, problem(404, f"{path} not found")
        if self.command == "DELETE":
            self.server.remove(path)
            return 200, {"status": "Success"}
        return 200, self.server.objects[path]

    def _allowed(self, wanted: dict[str, str]) -> bool:
        resource = "/".join(part for part in (wanted["resource"], wanted["subresource"]) if part)
        return (wanted["verb"], resource) not in self.server.denied

    def _create(self, collection: str, body: Object) -> tuple[int, Any]:
        if f"{collection}/{body['metadata']['name']}" in self.server.objects:
            return 409, problem(409, "already exists")
        # As the real one, which has a pod's phase from its first moment on.
        born = {"status": {"phase": "Pending"}} if collection.endswith("/pods") else {}
        made = self.server.add(collection, born | body)
        if self.server.kubelet and collection.endswith("/jobs") and not body["spec"].get("suspend"):
            self.server.start(collection, made)
        return 201, made

    def _selected(self, collection: str, selector: str) -> list[Object]:
        wanted = dict(pair.split("=") for pair in selector.split(",") if pair)
        found = [body for path, body in self.server.objects.items() if path.rpartition("/")[0] == collection]
        return [each for each in found if wanted.items() <= each["metadata"].get("labels", {}).items()]

    def _log(self, path: str, query: dict[str, str]) -> tuple[int, Any]:
        pod = path.split("/")[-2]
        if pod not in self.server.logs:
            return 400, problem(400, "container is waiting to start")
        since = query.get("sinceTime", "")
        return 200, "".join(f"{at} {line}\n" for at, line in self.server.logs[pod] if at >= since[:19])

    def _send(self, status: int, answer: Any) -> None:
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""


def problem(status: int, message: str) -> Object:
    """A Status object."""
    return {"kind": "Status", "status": "Failure", "message": message, "code": status}


def owners(body: Object) -> set[str]:
    """Uids of an object's owners."""
    return {each["uid"] for each in body["metadata"].get("ownerReferences", [])}


def now(nanoseconds: bool = False) -> str:
    """The time as Kubernetes writes it."""
    seconds = time.time()
    fraction = f".{int(seconds % 1 * 1e9):09d}" if nanoseconds else ""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + fraction + "Z"


def kubeconfig(server: FakeKubernetes, folder: Path, namespace: str) -> Path:
    """A file with which clients find the server."""
    context = {"cluster": "fake", "user": "fake", "namespace": namespace}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "fake", "cluster": {"server": server.url}}],
        "users": [{"name": "fake", "user": {"token": "t"}}],
        "contexts": [{"name": "fake", "context": context}],
        "current-context": "fake",
    }
    file = folder / "kubeconfig.json"
    file.write_text(json.dumps(config))
    return file
