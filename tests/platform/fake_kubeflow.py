"""A hand-written stand-in for the Kubeflow Pipelines API server: the part of its v2beta1 REST API that K2 uses.

The real server is a Go program with a database and a Kubernetes API behind it, which cannot run here. This one keeps
state, pages, filters, separates namespaces, checks tokens and fails on demand; it executes nothing.
"""

import email
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

Json = dict[str, Any]
PREFIX = "/apis/v2beta1"


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Kubeflow:
    """The server's state; tests read and change it."""

    url: str = ""
    multi_user: bool = False
    tokens: set[str] = field(default_factory=set)
    failures: list[int] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    admit: int | None = None
    tables: dict[str, dict[str, Json]] = field(
        default_factory=lambda: {name: {} for name in ("pipelines", "versions", "experiments", "runs", "recurringruns")}
    )
    clock: int = 0

    def insert(self, table: str, id_field: str, row: Json) -> Json:
        """Add a row with an ID and a time of its own."""
        self.clock += 1
        row |= {
            id_field: str(uuid.uuid4()),
            "created_at": f"2026-01-01T{self.clock // 60:02d}:{self.clock % 60:02d}:00Z",
        }
        self.tables[table][row[id_field]] = row
        return row

    def rows(self, table: str) -> list[Json]:
        """Newest first."""
        return sorted(self.tables[table].values(), key=lambda row: row["created_at"], reverse=True)

    def get(self, table: str, key: str) -> Json:
        """A row, or 404."""
        if key not in self.tables[table]:
            raise Refused(404, f"{table} {key} not found")
        return self.tables[table][key]

    def finish(self, name: str, state: str, **details: Any) -> None:
        """End the runs of a name."""
        for run in self.tables["runs"].values():
            if run["display_name"] == name:
                run |= {"state": state, **details}


@contextmanager
def serve(state: Kubeflow) -> Iterator[Kubeflow]:
    """The server on a free port of the loopback interface."""

    class Handler(_Handler):
        kubeflow = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    kubeflow: Kubeflow
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.kubeflow.requests.append(f"{self.command} {url.path.removeprefix(PREFIX)}")
        try:
            self._admit()
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            result = self._route(f"{self.command} {url.path.removeprefix(PREFIX)}", query, body)
            status = 200
        except Refused as error:
            key = "error_message" if "upload" in url.path else "message"
            status, result = error.status, {key: str(error)}
        data = json.dumps(result).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _admit(self) -> None:
        if self.kubeflow.failures:
            raise Refused(self.kubeflow.failures.pop(0), "out of\norder")
        if self.kubeflow.admit is not None:
            self.kubeflow.admit -= 1
            if self.kubeflow.admit < 0:
                raise Refused(500, "gone")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.kubeflow.tokens and token not in self.kubeflow.tokens:
            raise Refused(401, "unauthenticated")

    def _route(self, line: str, query: dict[str, str], body: bytes) -> Json:
        for pattern, handle in ROUTES:
            match = re.fullmatch(pattern, line)
            if match:
                parsed = (
                    body if b"form-data" in self.headers.get("Content-Type", "").encode() else json.loads(body or b"{}")
                )
                if isinstance(parsed, bytes):
                    parsed = {"file": _file(self.headers["Content-Type"], parsed)}
                return handle(self.kubeflow, match.groups(), query, parsed)
        raise Refused(404, f"no route for {line}")


def _file(content_type: str, body: bytes) -> str:
    message = email.message_from_bytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    payload = message.get_payload()[0].get_payload(decode=True)  # type: ignore[index,union-attr]
    assert isinstance(payload, bytes)
    return payload.decode()


def _page(state: Kubeflow, table: str, answer: str, query: dict[str, str], **equal: str) -> Json:
    rows = state.rows(table)
    if "filter" in query:
        (predicate,) = json.loads(query["filter"])["predicates"]
        assert predicate["operation"] in ("EQUALS", "IS_SUBSTRING")
        key, text = predicate["key"], predicate["stringValue"]
        whole = predicate["operation"] == "EQUALS"
        rows = [row for row in rows if (row.get(key) == text if whole else text in row[key])]
    if table != "versions":
        if state.multi_user and not query.get("namespace"):
            raise Refused(400, "a namespace is needed in multi-user mode")
        equal |= {"namespace": query["namespace"]} if state.multi_user else {}
    rows = [row for row in rows if all(row.get(key) == value for key, value in equal.items())]
    start, size = int(query.get("page_token") or 0), min(int(query.get("page_size") or 10), 3)
    rest = {"next_page_token": str(start + size)} if start + size < len(rows) else {}
    return {answer: rows[start : start + size], **rest}


def _by_name(state: Kubeflow, groups: tuple[str, ...], query: dict[str, str], body: Json) -> Json:
    for row in state.rows("pipelines"):
        if row["name"] == groups[0] and row.get("namespace") == query.get("namespace"):
            return row
    raise Refused(404, "no such pipeline")


def _upload(state: Kubeflow, groups: tuple[str, ...], query: dict[str, str], body: Json) -> Json:
    state.get("pipelines", query["pipelineid"])
    if any(row["name"] == query["name"] for row in state.rows("versions")):
        raise Refused(409, "already exists")
    tags = json.loads(query["tags"])
    if any("." in key or len(key) > 63 or len(value) > 63 for key, value in tags.items()):
        raise Refused(400, "tags: keys without dots, keys and values of at most 63 characters")
    spec, platform = yaml.load_all(body["file"], Loader=yaml.CSafeLoader)
    row = {
        "pipeline_id": query["pipelineid"],
        "name": query["name"],
        "display_name": query["display_name"],
        "tags": tags,
        "pipeline_spec": {"pipeline_spec": spec, "platform_spec": platform},
    }
    return state.insert("versions", "pipeline_version_id", row)


def _start(state: Kubeflow, groups: tuple[str, ...], query: dict[str, str], body: Json) -> Json:
    reference = body["pipeline_version_reference"]
    version = state.get("versions", reference["pipeline_version_id"])
    known = version["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    assert set(body["runtime_config"]["parameters"]) <= set(known)
    namespace = state.get("experiments", body["experiment_id"]).get("namespace")
    return state.insert("runs", "run_id", body | {"state": "PENDING", "namespace": namespace})


def _terminate(state: Kubeflow, groups: tuple[str, ...], query: dict[str, str], body: Json) -> Json:
    state.get("runs", groups[0])["state"] = "CANCELING"
    return {}


def _schedule(state: Kubeflow, groups: tuple[str, ...], query: dict[str, str], body: Json) -> Json:
    seconds = body["trigger"]["cron_schedule"]["cron"].split()
    if len(seconds) != 6:
        raise Refused(400, "a cron has six fields, seconds first")
    status = {"ENABLE": "ENABLED", "DISABLE": "DISABLED"}[body["mode"]]
    return state.insert("recurringruns", "recurring_run_id", body | {"status": status})


def _switch(status: str) -> Callable[..., Json]:
    def handle(state: Kubeflow, groups: tuple[str, ...], query: dict[str, str], body: Json) -> Json:
        state.get("recurringruns", groups[0])["status"] = status
        return {}

    return handle


def _make(table: str, id_field: str) -> Callable[..., Json]:
    return lambda state, groups, query, body: state.insert(table, id_field, body)


def _list(table: str, answer: str) -> Callable[..., Json]:
    return lambda state, groups, query, body: _page(state, table, answer, query)


def _read(table: str) -> Callable[..., Json]:
    return lambda state, groups, query, body: state.get(table, groups[-1])


def _delete(table: str) -> Callable[..., Json]:
    def handle(state: Kubeflow, groups: tuple[str, ...], query: dict[str, str], body: Json) -> Json:
        state.get(table, groups[-1])
        del state.tables[table][groups[-1]]
        return {}

    return handle


def _versions(state: Kubeflow, groups: tuple[str, ...], query: dict[str, str], body: Json) -> Json:
    return _page(state, "versions", "pipeline_versions", query, pipeline_id=groups[0])


ROUTES: list[tuple[str, Callable[..., Json]]] = [
    ("GET /healthz", lambda state, *_: {"multi_user": state.multi_user}),
    ("GET /pipelines/names/([^/]+)", _by_name),
    ("POST /pipelines", _make("pipelines", "pipeline_id")),
    ("POST /pipelines/upload_version", _upload),
    ("GET /pipelines/([^/]+)/versions", _versions),
    ("GET /pipelines/([^/]+)/versions/([^/]+)", _read("versions")),
    ("DELETE /pipelines/([^/]+)/versions/([^/]+)", _delete("versions")),
    ("GET /experiments", _list("experiments", "experiments")),
    ("POST /experiments", _make("experiments", "experiment_id")),
    ("GET /runs", _list("runs", "runs")),
    ("POST /runs", _start),
    ("POST /runs/([^/]+):terminate", _terminate),
    ("GET /runs/([^/]+)", _read("runs")),
    ("GET /recurringruns", _list("recurringruns", "recurringRuns")),
    ("POST /recurringruns", _schedule),
    ("POST /recurringruns/([^/]+):enable", _switch("ENABLED")),
    ("POST /recurringruns/([^/]+):disable", _switch("DISABLED")),
    ("DELETE /recurringruns/([^/]+)", _delete("recurringruns")),
]
