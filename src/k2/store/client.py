"""An S3 client over `minio` with conditional writes, verified transfers and retries.

One `Store` is one tenant's prefix in one bucket; names below it are relative.
"""

import base64
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import certifi
import urllib3
from minio import Minio
from minio.credentials.providers import (
    AWSConfigProvider,
    ChainedProvider,
    EnvAWSProvider,
    IamAwsProvider,
    Provider,
    StaticProvider,
)
from minio.error import MinioException, S3Error

from k2.errors import StageError, UserError

PART_SIZE = 16 * 1024 * 1024
"""Bytes of one multipart part; fixed so that an upload's expected ETag can be computed."""


class ConflictError(StageError):
    """A conditional write lost: the object exists already or has changed."""


class StoreError(StageError):
    """The object store refused or could not be reached; the message names the endpoint, never credentials."""


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object: name relative to the prefix, bytes, the store's ETag, and when it was written (Unix time)."""

    name: str
    size: int
    etag: str
    modified: float


@dataclass(frozen=True)
class StoreSettings:
    """Where the store is, from the environment; credentials are resolved separately and never printed."""

    endpoint: str
    bucket: str = "k2-data"
    prefix: str = "default"
    region: str = "us-east-1"
    timeout_s: float = 30.0
    retries: int = 4

    @classmethod
    def from_environment(cls) -> Self:
        """Read `K2_S3_ENDPOINT`, `K2_S3_BUCKET`, `K2_S3_PREFIX`, `K2_S3_REGION`, `K2_S3_TIMEOUT`, `K2_S3_RETRIES`.

        Raises:
            UserError: no endpoint is set, or a number is not one.
        """
        env = os.environ
        if not env.get("K2_S3_ENDPOINT"):
            raise UserError(
                "K2_S3_ENDPOINT is not set: give the URL of an S3 service, or use `k2 run`, which starts one"
            )
        try:
            timeout, retries = float(env.get("K2_S3_TIMEOUT", "30")), int(env.get("K2_S3_RETRIES", "4"))
        except ValueError as error:
            raise UserError(f"K2_S3_TIMEOUT and K2_S3_RETRIES must be numbers: {error}") from None
        return cls(
            endpoint=env["K2_S3_ENDPOINT"],
            bucket=env.get("K2_S3_BUCKET", "k2-data"),
            prefix=env.get("K2_S3_PREFIX", "default").strip("/"),
            region=env.get("K2_S3_REGION", "us-east-1"),
            timeout_s=timeout,
            retries=retries,
        )


def credentials() -> Provider:
    """Keys from `K2_S3_ACCESS_KEY`/`K2_S3_SECRET_KEY`, else AWS environment, config file or workload identity."""
    access, secret = os.environ.get("K2_S3_ACCESS_KEY"), os.environ.get("K2_S3_SECRET_KEY")
    if access and secret:
        return StaticProvider(access, secret)
    return ChainedProvider([EnvAWSProvider(), AWSConfigProvider(), IamAwsProvider()])


def _pool(settings: StoreSettings) -> urllib3.PoolManager:
    """A connection pool that retries 5xx, timeouts and resets with backoff and jitter, and honours CA and proxy."""
    retry = urllib3.Retry(
        total=settings.retries,
        backoff_factor=0.2,
        backoff_jitter=0.3,
        status_forcelist=(500, 502, 503, 504),
        allowed_methods=None,
        raise_on_status=False,
    )
    options: dict[str, Any] = {
        "timeout": urllib3.Timeout(connect=min(settings.timeout_s, 10.0), read=settings.timeout_s),
        "retries": retry,
        "maxsize": 8,
        "cert_reqs": "CERT_REQUIRED",
        "ca_certs": os.environ.get("K2_S3_CA") or os.environ.get("SSL_CERT_FILE") or certifi.where(),
    }
    secure = settings.endpoint.startswith("https")
    proxy = os.environ.get("HTTPS_PROXY" if secure else "HTTP_PROXY")
    bypass = (urlsplit(settings.endpoint).hostname or "") in os.environ.get("NO_PROXY", "").split(",")
    if proxy and not bypass:
        return urllib3.ProxyManager(proxy, **options)
    return urllib3.PoolManager(**options)


class Store:
    """One tenant's prefix in a bucket. Methods raise `StoreError` or `ConflictError`, never minio's own errors."""

    def __init__(self, settings: StoreSettings) -> None:
        url = urlsplit(settings.endpoint)
        if url.scheme not in ("http", "https") or not url.hostname or url.username:
            raise UserError("K2_S3_ENDPOINT must look like http(s)://host:port, without credentials")
        self.settings = settings
        self.bucket, self.prefix = settings.bucket, settings.prefix
        self._client = Minio(
            url.netloc,
            credentials=credentials(),
            secure=url.scheme == "https",
            region=settings.region,
            http_client=_pool(settings),
        )

    @classmethod
    def from_environment(cls) -> Self:
        """The store the environment names."""
        return cls(StoreSettings.from_environment())

    def url(self, name: str) -> str:
        """The `s3://` URL of a name."""
        return f"s3://{self.bucket}/{self.prefix}/{name}"

    def name(self, url: str) -> str:
        """The name behind an `s3://` URL of this store.

        Raises:
            UserError: the URL belongs to another bucket or prefix.
        """
        base = f"s3://{self.bucket}/{self.prefix}/"
        if not url.startswith(base):
            raise UserError(f"{url}: not in this store, whose URLs start with {base}")
        return url.removeprefix(base)

    def check(self) -> None:
        """Fail early and clearly when the store cannot be used.

        Raises:
            UserError: unreachable, credentials refused, or no such bucket.
        """
        try:
            # A HEAD request would answer without saying why it was refused.
            next(iter(self._client.list_objects(self.bucket, self._key(""))), None)
        except (*_FAILURES, ValueError) as error:
            raise UserError(
                f"object store {self.settings.endpoint}, bucket {self.bucket!r}: {_reason(error)}"
            ) from None

    def put(self, name: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None) -> str:
        """Write a small object in one request and return its ETag.

        Raises:
            ConflictError: `if_none_match` and it exists, or `if_match` and its ETag differs.
        """
        # Killed between headers and body, a writer leaves no empty object: SeaweedFS takes what fits its digest only.
        digest = hashlib.md5(data, usedforsecurity=False).digest()
        headers: dict[str, Any] = {"Content-MD5": base64.b64encode(digest).decode()}
        headers |= {"If-None-Match": "*"} if if_none_match else {}
        headers |= {"If-Match": f'"{if_match}"'} if if_match else {}
        try:
            # minio has no public conditional put.
            response = self._client._execute("PUT", self.bucket, self._key(name), body=data, headers=headers)
        except S3Error as error:
            if error.code in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise ConflictError(f"{self.url(name)}: changed by someone else") from None
            raise self._failed("write", name, error) from None
        except _FAILURES as error:
            raise self._failed("write", name, error) from None
        return response.headers["etag"].strip('"')

    def get(self, name: str) -> bytes | None:
        """The bytes of an object, or None when there is none."""
        found = self.get_tagged(name)
        return None if found is None else found[0]

    def get_range(self, name: str, start: int, length: int) -> bytes:
        """Some bytes of an object.

        Raises:
            StageError: there is no such object, or it is shorter.
        """
        found = self._get(name, start, length)
        if found is None or len(found[0]) != length:
            raise StageError(f"cannot read bytes {start} to {start + length} of {self.url(name)}: they are not there")
        return found[0]

    def get_tagged(self, name: str) -> tuple[bytes, str] | None:
        """The bytes of an object and its ETag, or None when there is none."""
        return self._get(name)

    def _get(self, name: str, start: int = 0, length: int = 0) -> tuple[bytes, str] | None:
        """A length of 0 is all."""
        try:
            response = self._client.get_object(self.bucket, self._key(name), offset=start, length=length)
            try:
                return response.data, response.headers["etag"].strip('"')
            finally:
                response.close()
                response.release_conn()
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchObject", "InvalidRange"):
                return None
            raise self._failed("read", name, error) from None
        except _FAILURES as error:
            raise self._failed("read", name, error) from None

    def stat(self, name: str) -> ObjectInfo | None:
        """Size and ETag of an object, or None when there is none."""
        try:
            found = self._client.stat_object(self.bucket, self._key(name))
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchObject"):
                return None
            raise self._failed("look up", name, error) from None
        except _FAILURES as error:
            raise self._failed("look up", name, error) from None
        return _info(name, found)

    def upload(self, path: Path, name: str) -> ObjectInfo:
        """Upload a file (multipart when large) and verify what the store holds by size and digest.

        Raises:
            StoreError: the stored bytes are not the file's.
        """
        try:
            self._client.fput_object(self.bucket, self._key(name), str(path), part_size=PART_SIZE)
        except _FAILURES as error:
            raise self._failed("upload", name, error) from None
        info = self.stat(name)
        if info is None or info.size != path.stat().st_size or not self._same_content(info, path):
            raise StoreError(f"{self.url(name)}: the stored object differs from what was uploaded; run again")
        return info

    def download(self, name: str, path: Path) -> None:
        """Write an object to a file. The caller verifies it and makes it visible.

        Raises:
            StoreError: there is no such object.
        """
        try:
            self._client.fget_object(self.bucket, self._key(name), str(path))
        except _FAILURES as error:
            raise self._failed("download", name, error) from None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose name starts with `prefix`, in the order of their names."""
        base = len(self._key(""))
        try:
            for item in self._client.list_objects(self.bucket, self._key(prefix), recursive=True):
                yield _info(str(item.object_name)[base:], item)
        except _FAILURES as error:
            raise self._failed("list", prefix, error) from None

    def delete(self, name: str) -> None:
        """Remove an object; removing what is not there is no error."""
        try:
            self._client.remove_object(self.bucket, self._key(name))
        except _FAILURES as error:
            raise self._failed("delete", name, error) from None

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def _same_content(self, info: ObjectInfo, path: Path) -> bool:
        """Compare by ETag where it is an MD5 of the parts, otherwise (encrypted buckets) by reading back."""
        if info.etag == expected_etag(path):
            return True
        data = self.get(info.name)
        with path.open("rb") as file:
            return data is not None and hashlib.sha256(data).digest() == hashlib.file_digest(file, "sha256").digest()

    def _failed(self, verb: str, name: str, error: Exception) -> StoreError:
        return StoreError(f"cannot {verb} {self.url(name)} at {self.settings.endpoint}: {_reason(error)}")


def _info(name: str, found: Any) -> ObjectInfo:
    modified = found.last_modified.timestamp() if found.last_modified else 0.0
    return ObjectInfo(name, found.size or 0, (found.etag or "").strip('"'), modified)


def expected_etag(path: Path) -> str:
    """The ETag S3 gives a file uploaded in parts of `PART_SIZE`: MD5, or MD5 of the parts' MD5s and their number."""
    parts: list[bytes] = []
    with path.open("rb") as file:
        while block := file.read(PART_SIZE):
            parts.append(hashlib.md5(block, usedforsecurity=False).digest())
    if len(parts) <= 1:
        return parts[0].hex() if parts else hashlib.md5(b"", usedforsecurity=False).hexdigest()
    return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"


_FAILURES = (MinioException, urllib3.exceptions.HTTPError)

_REASONS = {
    "InvalidAccessKeyId": "the access key is unknown; check K2_S3_ACCESS_KEY",
    "SignatureDoesNotMatch": "the secret key is wrong; check K2_S3_SECRET_KEY",
    "AccessDenied": "these credentials may not do this; check the bucket policy",
    "NoSuchBucket": "the bucket does not exist; create it or set K2_S3_BUCKET",
    "NoSuchKey": "no such object",
}


def _reason(error: Exception) -> str:
    """One line without URLs' query strings, headers or credentials."""
    if isinstance(error, S3Error):
        return _REASONS.get(error.code or "", f"{error.code}: {error.message}")
    if isinstance(error, urllib3.exceptions.MaxRetryError):
        return f"unreachable ({type(error.reason).__name__}); check K2_S3_ENDPOINT and the network"
    if isinstance(error, ValueError):
        return "no credentials found; set K2_S3_ACCESS_KEY and K2_S3_SECRET_KEY"
    return type(error).__name__
