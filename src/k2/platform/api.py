"""The part of Kubeflow Pipelines' API that K2 uses. Objects are those of `kfp_server_api`; errors are one line."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import kfp_server_api as server  # type: ignore[import-untyped]
import urllib3

from k2.config.deployment import Kubeflow
from k2.errors import StageError, UserError
from k2.platform.render import Rendering

TOKEN_PATH = "/var/run/secrets/kubeflow/pipelines/token"
"""Where a projected token with audience pipelines.kubeflow.org is mounted; KF_PIPELINES_SA_TOKEN_PATH overrides it."""

ENDED = frozenset({"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"})
"""States that a run does not leave."""

PAGE = 100


class ApiError(StageError):
    """The API server refused a request, or failed; `status` is the HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class UnreachableError(UserError):
    """The API server does not answer."""


class PipelinesApi:
    """Pipelines, versions, runs and recurring runs of one namespace. Methods raise `ApiError`, `UnreachableError`."""

    def __init__(self, access: Kubeflow) -> None:
        """Connects to nothing yet; `check` does."""
        self.access = access
        self.endpoint = (os.environ.get("KF_PIPELINES_ENDPOINT") or access.endpoint).rstrip("/")
        client = server.ApiClient(_configuration(self.endpoint))
        self._pipelines, self._uploads = server.PipelineServiceApi(client), server.PipelineUploadServiceApi(client)
        self._runs, self._recurring = server.RunServiceApi(client), server.RecurringRunServiceApi(client)
        self._experiments, self._health = server.ExperimentServiceApi(client), server.HealthzServiceApi(client)
        self._namespace = {"namespace": access.namespace} if access.multi_user else {}

    def check(self) -> None:
        """Fail early and clearly when nothing can be done here.

        Raises:
            UserError: unreachable, not Kubeflow Pipelines, or not of the kind that the deployment file says.
        """
        try:
            multi_user = bool(self._call(self._health.healthz_service_get_healthz).multi_user)
        except ApiError as error:
            raise UserError(f"kubeflow.endpoint: {error}") from None
        if multi_user != self.access.multi_user:
            kind = "separates profiles" if multi_user else "has one namespace for all"
            raise UserError(f"kubeflow.multi_user: {self.endpoint} {kind}; set it to {str(multi_user).lower()}")

    def pipeline(self, name: str) -> Any | None:
        """The pipeline of a name."""
        return self._found(self._pipelines.pipeline_service_get_pipeline_by_name, name, **self._namespace)

    def create_pipeline(self, name: str, description: str) -> Any:
        """A new pipeline, without versions."""
        return self._call(
            self._pipelines.pipeline_service_create_pipeline,
            server.V2beta1Pipeline(name=name, display_name=name, description=description, **self._namespace),
        )

    def versions(self, pipeline_id: str) -> list[Any]:
        """All versions of a pipeline, newest first."""
        return list(
            self._pages(self._pipelines.pipeline_service_list_pipeline_versions, "pipeline_versions", pipeline_id)
        )

    def version(self, pipeline_id: str, version_id: str) -> Any | None:
        """One version."""
        return self._found(self._pipelines.pipeline_service_get_pipeline_version, pipeline_id, version_id)

    def upload_version(self, pipeline_id: str, rendering: Rendering, revision: str) -> Any:
        """A new version with the rendering's content and name."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{rendering.version}.yaml"
            file.write_text(rendering.ir(), encoding="utf-8")
            return self._call(
                self._uploads.upload_pipeline_version,
                str(file),
                name=rendering.version,
                display_name=rendering.version,
                pipelineid=pipeline_id,
                description=rendering.description,
                tags=json.dumps(rendering.tags(revision), sort_keys=True),
            )

    def delete_version(self, pipeline_id: str, version_id: str) -> None:
        """Remove a version; one that is gone is no error."""
        self._found(self._pipelines.pipeline_service_delete_pipeline_version, pipeline_id, version_id)

    def experiment_id(self) -> str:
        """The deployment's experiment, made when it is not there."""
        name, list_all = self.access.experiment, self._experiments.experiment_service_list_experiments
        found = self._pages(list_all, "experiments", filter=_equals("display_name", name), **self._namespace)
        for experiment in found:
            return str(experiment.experiment_id)
        wanted = server.V2beta1Experiment(display_name=name, **self._namespace)
        return str(self._call(self._experiments.experiment_service_create_experiment, wanted).experiment_id)

    def runs(self, name: str | None = None) -> Iterator[Any]:
        """All runs, or those of one display name, newest first."""
        chosen = {"filter": _equals("display_name", name)} if name else {}
        return self._pages(self._runs.run_service_list_runs, "runs", **chosen, **self._namespace)

    def series(self, name: str) -> Iterator[Any]:
        """The runs whose display name is `name-` and six hexadecimal digits."""
        chosen = self._pages(self._runs.run_service_list_runs, "runs", filter=_contains(f"{name}-"), **self._namespace)
        return (run for run in chosen if re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{6}}", run.display_name))

    def run(self, run_id: str) -> Any | None:
        """One run with the details of its tasks."""
        return self._found(self._runs.run_service_get_run, run_id)

    def create_run(self, name: str, version: Any, parameters: dict[str, Any]) -> Any:
        """Start a run of a version."""
        return self._call(
            self._runs.run_service_create_run,
            server.V2beta1Run(
                display_name=name,
                experiment_id=self.experiment_id(),
                service_account=self.access.service_account,
                pipeline_version_reference=_reference(version),
                runtime_config=server.V2beta1RuntimeConfig(parameters=parameters),
            ),
        )

    def terminate(self, run_id: str) -> None:
        """Ask a run to stop; its exit handler still runs."""
        self._call(self._runs.run_service_terminate_run, run_id)

    def recurring_runs(self) -> list[Any]:
        """All recurring runs."""
        return list(
            self._pages(self._recurring.recurring_run_service_list_recurring_runs, "recurring_runs", **self._namespace)
        )

    def create_recurring_run(self, name: str, version: Any, **settings: Any) -> Any:
        """A new recurring run, disabled. `settings`: cron, parameters, max_concurrency, no_catchup, description."""
        cron = server.V2beta1CronSchedule(cron=settings.pop("cron"))
        return self._call(
            self._recurring.recurring_run_service_create_recurring_run,
            server.V2beta1RecurringRun(
                display_name=name,
                experiment_id=self.experiment_id(),
                service_account=self.access.service_account,
                pipeline_version_reference=_reference(version),
                runtime_config=server.V2beta1RuntimeConfig(parameters=settings.pop("parameters")),
                trigger=server.V2beta1Trigger(cron_schedule=cron),
                mode="DISABLE",
                **settings,
                **self._namespace,
            ),
        )

    def enable(self, recurring_run_id: str) -> None:
        """Let a recurring run fire."""
        self._call(self._recurring.recurring_run_service_enable_recurring_run, recurring_run_id)

    def disable(self, recurring_run_id: str) -> None:
        """Keep a recurring run from firing."""
        self._call(self._recurring.recurring_run_service_disable_recurring_run, recurring_run_id)

    def delete_recurring_run(self, recurring_run_id: str) -> None:
        """Remove a recurring run; one that is gone is no error."""
        self._found(self._recurring.recurring_run_service_delete_recurring_run, recurring_run_id)

    def _call(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        limit = self.access.timeout_s
        try:
            return method(*arguments, _request_timeout=(min(limit, 10.0), limit), **options)
        except server.ApiException as error:
            raise ApiError(f"{self.endpoint}: {_reason(error)}", error.status or 0) from None
        except urllib3.exceptions.HTTPError as error:
            cause = getattr(error, "reason", None) or error
            raise UnreachableError(
                f"kubeflow.endpoint: {self.endpoint} is unreachable ({type(cause).__name__}); correct it in the"
                " deployment file, or set KF_PIPELINES_ENDPOINT, for example to a port-forward"
            ) from None

    def _found(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any | None:
        try:
            return self._call(method, *arguments, **options)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def _pages(self, method: Callable[..., Any], field: str, *arguments: Any, **options: Any) -> Iterator[Any]:
        token = ""
        while True:
            page = self._call(
                method, *arguments, page_token=token, page_size=PAGE, sort_by="created_at desc", **options
            )
            yield from getattr(page, field) or ()
            token = page.next_page_token
            if not token:
                return


def _configuration(endpoint: str) -> Any:
    """CA bundle and proxy from the environment, retries of what may be repeated, and a token read for each request."""
    configuration = server.Configuration(host=endpoint)
    configuration.ssl_ca_cert = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
    url = urlsplit(endpoint)
    if not proxy_bypass(url.hostname or ""):
        configuration.proxy = getproxies().get(url.scheme)
    configuration.retries = urllib3.Retry(
        total=4,
        connect=2,
        status_forcelist=(502, 503, 504),
        backoff_factor=0.2,
        backoff_jitter=0.2,
        raise_on_status=False,
    )
    token = Path(os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", TOKEN_PATH))
    if token.exists():
        configuration.api_key["authorization"], configuration.api_key_prefix["authorization"] = "", "Bearer"
        configuration.refresh_api_key_hook = lambda each: each.api_key.update(authorization=_read(token))
    return configuration


def _read(token: Path) -> str:
    """The kubelet replaces the file before the token expires."""
    try:
        return token.read_text(encoding="ascii").strip()
    except OSError as error:
        raise UserError(f"{token}: the token cannot be read: {error.strerror}") from None


def _equals(key: str, value: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "stringValue": value}]})


def _contains(text: str) -> str:
    return json.dumps({"predicates": [{"operation": "IS_SUBSTRING", "key": "display_name", "stringValue": text}]})


def _reference(version: Any) -> Any:
    return server.V2beta1PipelineVersionReference(
        pipeline_id=version.pipeline_id, pipeline_version_id=version.pipeline_version_id
    )


_REFUSALS = {
    401: "the token was not accepted; mount one with the audience pipelines.kubeflow.org",
    403: "the service account may not do this; bind it to a role with the verb that is named here",
}


def _reason(error: Any) -> str:
    """One line: the server's message and, where it helps, what to do."""
    try:
        said = json.loads(error.body or "{}")
        # Uploads answer in a form of their own.
        message = str(said.get("message") or said["error_message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        message = str(error.reason or "no reason given")
    line = " ".join(message.split())[:300]
    remedy = _REFUSALS.get(error.status)
    return f"{error.status} {line}" + (f"; {remedy}" if remedy else "")
