"""From a pipeline and a deployment to what Kubeflow takes: IR YAML, and Pipeline and PipelineVersion resources."""

import hashlib
import importlib
import json
import warnings
from dataclasses import dataclass
from typing import Any

import yaml

from k2.config.base import canonical_json
from k2.config.deployment import Deployment
from k2.errors import UserError

PIPELINES = {
    "k2": ("pipelines.k2", "k2"),
    "k2-retrain": ("pipelines.retrain", "retrain"),
    "ablation-heads": ("pipelines.ablations.heads", "heads"),
    "ablation-muonclip-vs-adamw": ("pipelines.ablations.muonclip_vs_adamw", "muonclip_vs_adamw"),
    "ablation-qk-clip": ("pipelines.ablations.qk_clip", "qk_clip"),
    "ablation-qk-clip-decay": ("pipelines.ablations.qk_clip_decay", "qk_clip_decay"),
    "ablation-sparsity": ("pipelines.ablations.sparsity", "sparsity"),
}
"""Pipeline -> module and function."""

RECIPES = ("k2", "k2-retrain")
"""The pipelines that are delivered unless others are named."""

MAX_BYTES = 200 * 1024
"""Bytes of a compiled pipeline: applying it stays far from the API server's limits."""

SPEC_TAG = "k2-spec"
REVISION_TAG = "k2-revision"
TAG_LENGTH = 63
"""Kubeflow's limit for the keys and values of tags; keys have no dots."""

_GROUP = "pipelines.kubeflow.org/v2beta1"
_KEEP = {
    "argocd.argoproj.io/sync-options": "Prune=false,ServerSideApply=true",
    "kustomize.toolkit.fluxcd.io/prune": "disabled",
    "helm.sh/resource-policy": "keep",
}
"""A version that left Git may still have runs and schedules: only `k2 pipeline prune` removes it."""


@dataclass(frozen=True)
class Rendering:
    """One pipeline for one deployment. `version` is named by the digest of both specs."""

    pipeline: str
    description: str
    spec: dict[str, Any]
    platform: dict[str, Any]

    @property
    def digest(self) -> str:
        """Names everything that a run of it is made of."""
        return spec_digest(self.spec, self.platform)

    @property
    def version(self) -> str:
        """Name of the version."""
        return f"{self.pipeline}-{self.digest[:12]}"

    def tags(self, revision: str) -> dict[str, str]:
        """What the UI shows beside the version.

        Raises:
            UserError: the revision is too long for a tag.
        """
        if len(revision) > TAG_LENGTH:
            raise UserError(f"--revision: {len(revision)} characters, over {TAG_LENGTH}; give the commit's hash")
        return {SPEC_TAG: self.digest} | ({REVISION_TAG: revision} if revision else {})

    def ir(self) -> str:
        """IR YAML: the pipeline's and the platform's specification.

        Raises:
            UserError: it is larger than `MAX_BYTES`.
        """
        text = _yaml(self.spec) + "---\n" + _yaml(self.platform)
        if len(text.encode()) > MAX_BYTES:
            raise UserError(f"{self.pipeline}: compiled it has {len(text.encode())} bytes, over {MAX_BYTES}")
        return text

    def resources(self, namespace: str, revision: str) -> str:
        """The Kubernetes-native form, the pipeline one sync wave before its version."""
        version = {
            "description": self.description,
            "displayName": self.version,
            "pipelineName": self.pipeline,
            "pipelineSpec": self.spec,
            "platformSpec": self.platform,
            "tags": self.tags(revision),
        }
        pipeline = {"description": self.description, "displayName": self.pipeline}
        return "---\n".join(
            (
                _yaml(_resource("Pipeline", self.pipeline, namespace, 0, pipeline)),
                _yaml(_resource("PipelineVersion", self.version, namespace, 1, version)),
            )
        )


def render(pipeline: str, deployment: Deployment) -> Rendering:
    """Build the pipeline for the deployment.

    Raises:
        UserError: there is no such pipeline.
    """
    if pipeline not in PIPELINES:
        raise UserError(f"pipeline {pipeline!r}: there is none; the pipelines are {', '.join(PIPELINES)}")
    from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]
    from kfp import dsl

    module, function = PIPELINES[pipeline]
    placed = importlib.import_module("pipelines.placement").deployed
    with warnings.catch_warnings(), placed(deployment):
        warnings.simplefilter("ignore")
        local = getattr(importlib.import_module(module), function)
        about = local.component_spec.description
        limits = dsl.PipelineConfig(
            active_deadline_seconds=_seconds(deployment.timeouts.run_hours),
            ttl_seconds_after_finished=_seconds(deployment.timeouts.keep_hours),
        )
        built = dsl.pipeline(name=pipeline, description=about, pipeline_config=limits)(local.pipeline_func)
    spec = MessageToDict(built.pipeline_spec)
    if deployment.preset:
        spec["root"]["inputDefinitions"]["parameters"]["preset"]["defaultValue"] = deployment.preset
    _turn_caches_off(spec)
    return Rendering(pipeline, about, spec, MessageToDict(built.platform_spec))


def _seconds(hours: float | None) -> int | None:
    return None if hours is None else int(3600 * hours)


def spec_digest(spec: Any, platform: Any) -> str:
    """160 bits of the SHA-256 of a pipeline and its placement, in hex, which fit a tag.

    Numbers count by value, as KFP's API returns 1 for 1.0.
    """
    plain = json.loads(canonical_json([spec, platform]), parse_int=float)
    return hashlib.sha256(canonical_json(plain).encode()).hexdigest()[:40]


def _turn_caches_off(node: Any) -> None:
    """Also for the groups of tasks, which kfp caches whatever their tasks say."""
    if isinstance(node, dict):
        if "cachingOptions" in node:
            node["cachingOptions"] = {}
        for value in node.values():
            _turn_caches_off(value)


def _resource(kind: str, name: str, namespace: str, wave: int, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": _GROUP,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"app.kubernetes.io/name": "k2", "app.kubernetes.io/part-of": "k2"},
            "annotations": {"argocd.argoproj.io/sync-wave": str(wave), **_KEEP},
        },
        "spec": spec,
    }


def _yaml(value: dict[str, Any]) -> str:
    text: str = yaml.dump(value, Dumper=yaml.CSafeDumper, sort_keys=True, width=120)
    return text
