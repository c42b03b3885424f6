"""Every object is what Kubernetes' API takes, in the last three minor versions, with nothing in it that the API does not know.

Objects of operators (KEDA, Prometheus, Gateway API) are held against schemas written here after their references, of the fields that are used.
"""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
from jsonschema import Draft202012Validator, ValidationError
from kubernetes_validate.utils import all_versions
from rendering import VARIANTS, variant

VERSIONS = ("1.35", "1.36", "1.37")


def of(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


TEXT, WHOLE = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
EXPRESSION = of(["key", "operator"], key=TEXT, operator={"enum": ["In", "NotIn", "Exists", "DoesNotExist"]}, values=listed(TEXT))
METADATA = of(["name"], name=TEXT, labels=TEXTS)
PROMETHEUS = of(["serverAddress", "query", "threshold"], serverAddress=TEXT, query=TEXT, threshold=TEXT, ignoreNullValues={"enum": ["true", "false"]})
METRICS_API = of(
    ["url", "valueLocation", "targetValue"],
    url={"pattern": "^http://[^/]+/"},
    valueLocation=TEXT,
    targetValue={"pattern": r"^[0-9.]+$"},
    authMode={"enum": ["apiKey", "basic", "tls", "bearer"]},
)
AVERAGE_OR_VALUE = {"enum": ["AverageValue", "Value"]}
TRIGGER = {
    "oneOf": [
        of(["type", "metadata"], type={"const": "prometheus"}, metricType=AVERAGE_OR_VALUE, metadata=PROMETHEUS),
        of(
            ["type", "metadata"],
            type={"const": "metrics-api"},
            metricType=AVERAGE_OR_VALUE,
            metadata=METRICS_API,
            authenticationRef=of(["name"], name=TEXT, kind=TEXT),
        ),
    ]
}
SCALED_OBJECT = of(
    ["scaleTargetRef", "triggers"],
    scaleTargetRef=of(["name"], apiVersion=TEXT, kind=TEXT, name=TEXT),
    minReplicaCount=WHOLE,
    maxReplicaCount=WHOLE,
    pollingInterval=WHOLE,
    cooldownPeriod=WHOLE,
    fallback=of(["failureThreshold", "replicas"], failureThreshold=WHOLE, replicas=WHOLE),
    advanced=of([], horizontalPodAutoscalerConfig=of([], behavior={"type": "object"})),
    triggers=listed(TRIGGER),
)
TRIGGER_AUTHENTICATION = of(["secretTargetRef"], secretTargetRef=listed(of(["parameter", "name", "key"], parameter=TEXT, name=TEXT, key=TEXT)))
POD_MONITOR = of(
    ["selector", "podMetricsEndpoints"],
    selector=of([], matchLabels=TEXTS, matchExpressions=listed(EXPRESSION)),
    podTargetLabels=listed(TEXT),
    podMetricsEndpoints=listed(of([], port=TEXT, path=TEXT, interval={"pattern": "^[0-9]+(ms|s|m|h)$"})),
)
PATH_MATCH = of(["type", "value"], type={"enum": ["Exact", "PathPrefix", "RegularExpression"]}, value={"pattern": "^/"})
HTTP_ROUTE = of(
    ["parentRefs", "rules"],
    parentRefs=listed(of(["name"], name=TEXT, namespace=TEXT, sectionName=TEXT)),
    hostnames=listed({"type": "string", "format": "hostname"}),
    rules=listed(
        of(
            ["backendRefs"],
            matches=listed(of([], path=PATH_MATCH)),
            backendRefs=listed(of(["name", "port"], name=TEXT, port=WHOLE)),
            timeouts=of([], request={"pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}),
        )
    ),
)
OPERATORS = {
    ("keda.sh/v1alpha1", "ScaledObject"): SCALED_OBJECT,
    ("keda.sh/v1alpha1", "TriggerAuthentication"): TRIGGER_AUTHENTICATION,
    ("monitoring.coreos.com/v1", "PodMonitor"): POD_MONITOR,
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): HTTP_ROUTE,
}


def check(one: dict[str, Any], version: str) -> None:
    spec = OPERATORS.get((one["apiVersion"], one["kind"]))
    if spec is None:
        kubernetes_validate.validate(one, version, strict=True)
    else:
        Draft202012Validator(of(["apiVersion", "kind", "metadata", "spec"], apiVersion={}, kind={}, metadata=METADATA, spec=spec)).validate(one)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_object_is_valid(name: str, version: str) -> None:
    for one in variant(name):
        check(one, version)


def test_the_versions_are_the_last_three() -> None:
    known = sorted({tuple(map(int, found.split(".")[:2])) for found in all_versions()})
    assert [f"{major}.{minor}" for major, minor in known[-3:]] == list(VERSIONS)


def named(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(one for one in objects if one["kind"] == kind)


@pytest.mark.parametrize("kind", ["StatefulSet", "Deployment", "NetworkPolicy", "PodDisruptionBudget", "ScaledObject", "PodMonitor", "HTTPRoute"])
def test_a_key_that_nobody_knows_is_refused(kind: str) -> None:
    one = named(variant("gpu"), kind)
    check(one, VERSIONS[-1])
    one["spec"]["replica"] = 2
    with pytest.raises((kubernetes_validate.ValidationError, ValidationError)):
        check(one, VERSIONS[-1])


def test_every_kind_is_rendered_by_some_variant() -> None:
    kinds = {one["kind"] for name in VARIANTS for one in variant(name)}
    workloads, network = {"Deployment", "StatefulSet", "DaemonSet", "ServiceAccount"}, {"NetworkPolicy", "Service"}
    assert kinds == workloads | network | {"ConfigMap", "HorizontalPodAutoscaler", "PodDisruptionBudget"} | {kind for _, kind in OPERATORS}
