"""Renders and validates: kustomizations, built-in objects of three Kubernetes minors, custom resources."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from manifests import tools

ROOT = Path(__file__).parents[2]
MINORS = ("1.35.0", "1.36.0", "1.37.0")
TYPES: dict[str, dict[str, Any]] = {
    "string": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "quantity": {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?$"},
    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
    "object": {"type": "object"},
    "podTemplate": {"type": "object", "required": ["spec"]},
}
CUSTOM = yaml.safe_load((Path(__file__).with_name("schemas.yaml")).read_text())

# Otherwise it parses megabytes of schema for each object.
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)

Object = dict[str, Any]
OPERATORS: dict[str, Callable[[str | None, list[str]], bool]] = {
    "In": lambda value, values: value in values,
    "NotIn": lambda value, values: value not in values,
    "Exists": lambda value, _: value is not None,
}


def tool(name: str) -> str:
    """Path of a command-line tool; without it the test is skipped, and in CI the tool is fetched."""
    found = tools.fetch(name) if os.environ.get("CI") == "true" else tools.find(name)
    if found is None:
        pytest.skip(f"needs {name}: `python manifests/tools.py` fetches it")
    return found


@cache
def kustomize(path: str) -> tuple[Object, ...]:
    """The objects of a kustomization of this repository."""
    command = [tool("kubectl"), "kustomize", str(ROOT / path)]
    text = subprocess.run(command, capture_output=True, text=True, check=False)
    assert text.returncode == 0, text.stderr
    assert not text.stderr, text.stderr
    return tuple(yaml.safe_load_all(text.stdout))


def name(thing: Object) -> str:
    return f"{thing['kind']}/{thing['metadata']['name']}"


def schema(shape: Any) -> dict[str, Any]:
    """JSON schema of a shape as schemas.yaml writes them."""
    if isinstance(shape, str):
        return TYPES.get(shape) or {"enum": shape.split("|")}
    if isinstance(shape, list):
        return {"type": "array", "minItems": 1, "items": schema(shape[0])}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [key for key in shape if not key.endswith("?")],
        "properties": {key.removesuffix("?"): schema(value) for key, value in shape.items()},
    }


def validate(thing: Object) -> None:
    """Raise when an object is not what its API takes; pods inside custom resources are checked as pods."""
    _validate(json.dumps(thing))


@cache
def _validate(text: str) -> None:
    thing = json.loads(text)
    shape = CUSTOM.get(f"{thing['apiVersion']}/{thing['kind']}")
    if shape is None:
        for minor in MINORS:
            kubernetes_validate.validate(thing, minor, strict=True)
        return
    body = {key: value for key, value in thing.items() if key not in ("apiVersion", "kind", "metadata")}
    jsonschema.validate(body, schema(shape))
    for template in pod_templates(thing):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"} | template["metadata"]}
        validate(pod | {"spec": template["spec"]})


def is_custom(thing: Object) -> bool:
    return f"{thing['apiVersion']}/{thing['kind']}" in CUSTOM


def pod_templates(thing: Any) -> Iterator[dict[str, Any]]:
    """Every pod template anywhere inside an object."""
    if isinstance(thing, dict):
        if "containers" in thing.get("spec", {}):
            yield thing
        for value in thing.values():
            yield from pod_templates(value)
    elif isinstance(thing, list):
        for value in thing:
            yield from pod_templates(value)


def assert_restricted(template: dict[str, Any]) -> None:
    """The pod is admitted by Pod Security `restricted`, has a read-only root, bounded resources and no sidecar."""
    spec, labels = template["spec"], template["metadata"]["labels"]
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert labels["sidecar.istio.io/inject"] == "false"
    assert labels["app.kubernetes.io/part-of"] == "k2"
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert all("hostPath" not in volume for volume in spec.get("volumes", []))
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert set(container["resources"]["requests"]) >= {"cpu", "memory", "ephemeral-storage"}
        assert set(container["resources"]["limits"]) >= {"memory", "ephemeral-storage"}
        assert "@sha256:" in container["image"], container["image"]


def allowed(policies: list[Object], labels: dict[str, str], direction: str) -> list[Object]:
    """The rules, `ingress` or `egress`, of all policies that select a pod with these labels."""
    assert any(selects(each["spec"]["podSelector"], labels) for each in policies), "no policy: everything is allowed"
    found = [each for each in policies if selects(each["spec"]["podSelector"], labels)]
    return [rule for each in found for rule in each["spec"].get(direction, [])]


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector selects a pod with these labels."""
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        OPERATORS[each["operator"]](labels.get(each["key"]), each.get("values", []))
        for each in selector.get("matchExpressions", [])
    )
