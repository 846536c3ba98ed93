"""The S3 client against a real server, and against one that misbehaves."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

from k2.errors import UserError
from k2.store.client import PART_SIZE, ConflictError, Store, StoreError, expected_etag
from k2.store.embedded import Server


def test_conditional_writes(store: Store) -> None:
    first = store.put("a", b"1", if_none_match=True)
    with pytest.raises(ConflictError):
        store.put("a", b"2", if_none_match=True)
    second = store.put("a", b"2", if_match=first)
    with pytest.raises(ConflictError):
        store.put("a", b"3", if_match=first)
    assert store.get_tagged("a") == (b"2", second)


DIES_AFTER_HEADERS = """
import os, sys
from http.client import HTTPConnection
from k2.store.client import Store

send, store = HTTPConnection.send, Store.from_environment()

def once(connection, data):
    send(connection, data)
    os._exit(9)

HTTPConnection.send = once
store.put("pointer", b"what the object is to hold", if_match=sys.argv[1] or None, if_none_match=not sys.argv[1])
"""


@pytest.mark.parametrize("before", [None, b"what it holds"], ids=["a new object", "an object that is replaced"])
def test_a_put_killed_between_headers_and_body_changes_nothing(store: Store, before: bytes | None) -> None:
    etag = "" if before is None else store.put("pointer", before)
    killed = subprocess.run([sys.executable, "-c", DIES_AFTER_HEADERS, etag], check=False)
    time.sleep(0.3)  # until the server has noticed
    assert killed.returncode == 9
    assert store.get("pointer") == before


def test_what_is_not_there(store: Store) -> None:
    assert store.get("missing") is None
    assert store.stat("missing") is None
    store.delete("missing")
    assert list(store.list("missing")) == []


@pytest.mark.parametrize("size", [0, 5, PART_SIZE, PART_SIZE + 1])
def test_uploads_are_verified_by_etag(store: Store, tmp_path: Path, size: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * size)
    info = store.upload(path, "f")
    assert (info.size, info.etag) == (size, expected_etag(path))
    store.download("f", tmp_path / "g")
    assert (tmp_path / "g").read_bytes() == path.read_bytes()


def test_tenants_do_not_see_each_other(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("a", b"1")
    monkeypatch.setenv("K2_S3_PREFIX", "another")
    other = Store.from_environment()
    assert other.get("a") is None
    with pytest.raises(UserError, match="not in this store"):
        other.name(store.url("a"))


def test_wrong_secret_is_one_clear_line_without_the_secret(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2_S3_SECRET_KEY", "not-the-secret")
    with pytest.raises(UserError, match="secret key is wrong; check K2_S3_SECRET_KEY") as caught:
        Store.from_environment().check()
    assert "not-the-secret" not in str(caught.value)


def test_missing_bucket_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2_S3_BUCKET", "no-such-bucket")
    with pytest.raises(UserError, match="'no-such-bucket': the bucket does not exist"):
        Store.from_environment().check()


def test_unreachable_endpoint_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("K2_S3_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("K2_S3_RETRIES", "1")
    with pytest.raises(UserError, match=f"127.0.0.1:{port}, bucket .*: unreachable"):
        Store.from_environment().check()


@pytest.mark.parametrize("endpoint", ["localhost:9000", "ftp://x", "http://key:secret@host"])
def test_malformed_endpoint(store: Store, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("K2_S3_ENDPOINT", endpoint)
    with pytest.raises(UserError, match="must look like") as caught:
        Store.from_environment()
    assert "secret@" not in str(caught.value)


class Proxy(BaseHTTPRequestHandler):
    """Passes requests on, except that it fails or damages some as the class says."""

    upstream = ""
    fail_next = 0
    cut_uploads = False

    def _pass_on(self) -> None:
        cls = type(self)
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if cls.fail_next > 0:
            cls.fail_next -= 1
            self.send_error(503)
            return
        if cls.cut_uploads and self.command == "PUT":
            self.send_response(200)
            self.send_header("etag", '"0"')
            self.send_header("content-length", "0")
            self.end_headers()
            return
        self._answer(body)

    def _answer(self, body: bytes) -> None:
        headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
        request = Request(type(self).upstream + self.path, body or None, headers, method=self.command)
        with urlopen(request) as answer:
            data = answer.read()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            self.send_header("content-length", answer.headers.get("content-length") or str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass_on

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@pytest.fixture
def proxy(store: Store, s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Proxy]]:
    handler = type("Handler", (Proxy,), {"upstream": s3_server.endpoint})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    # The signature covers the host, so the server must see the name the client signed.
    monkeypatch.setenv("K2_S3_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert urlsplit(s3_server.endpoint).hostname == "127.0.0.1"
    yield handler
    server.shutdown()
    server.server_close()


def test_transient_server_errors_are_retried(store: Store, proxy: type[Proxy]) -> None:
    through = Store.from_environment()
    proxy.fail_next = 2
    through.put("retried", b"1")
    proxy.fail_next = 2
    assert through.get("retried") == b"1"


def test_persistent_server_errors_name_the_object(
    store: Store, proxy: type[Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K2_S3_RETRIES", "1")
    proxy.fail_next = 99
    with pytest.raises(StoreError, match=r"cannot write s3://k2-data/.*/lost"):
        Store.from_environment().put("lost", b"1")


def test_an_upload_the_server_swallowed_is_noticed(store: Store, proxy: type[Proxy], tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"data")
    proxy.cut_uploads = True
    with pytest.raises(StoreError, match=r"differs from what was uploaded|cannot"):
        Store.from_environment().upload(path, "f")
