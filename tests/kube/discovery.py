"""What the server says about itself, as far as kubectl asks."""

from __future__ import annotations

from dataclasses import dataclass

from tests.kube.answers import Object

VERSION: Object = {"major": "1", "minor": "33", "gitVersion": "v1.33.0", "platform": "linux/amd64"}
CORE: Object = {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
_AUTHORIZATION = {"groupVersion": "authorization.k8s.io/v1", "version": "v1"}
GROUPS: Object = {
    "kind": "APIGroupList",
    "apiVersion": "v1",
    "groups": [
        {"name": "authorization.k8s.io", "versions": [_AUTHORIZATION], "preferredVersion": _AUTHORIZATION},
    ],
}
REVIEWS: Object = {
    "kind": "APIResourceList",
    "apiVersion": "v1",
    "groupVersion": "authorization.k8s.io/v1",
    "resources": [
        {
            "name": "selfsubjectaccessreviews",
            "singularName": "",
            "namespaced": False,
            "kind": "SelfSubjectAccessReview",
            "verbs": ["create"],
        }
    ],
}


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of object that the server keeps."""

    name: str
    kind: str
    short: str
    namespaced: bool = True


RESOURCES = {
    each.name: each
    for each in (
        Resource("pods", "Pod", "po"),
        Resource("configmaps", "ConfigMap", "cm"),
        Resource("resourcequotas", "ResourceQuota", "quota"),
        Resource("namespaces", "Namespace", "ns", namespaced=False),
    )
}


def core_resources() -> Object:
    """The list of what /api/v1 has."""
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources: list[Object] = [
        {
            "name": each.name,
            "singularName": each.kind.lower(),
            "namespaced": each.namespaced,
            "kind": each.kind,
            "verbs": verbs,
            "shortNames": [each.short],
        }
        for each in RESOURCES.values()
    ]
    execs = {"name": "pods/exec", "singularName": "", "namespaced": True, "kind": "PodExecOptions"}
    resources.append({**execs, "verbs": ["create", "get"]})
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "v1", "resources": resources}


def openapi() -> Object:
    """As much of the OpenAPI document of /api/v1 as makes kubectl leave validation to the server."""
    parameter = {"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}
    paths = {
        f"/api/v1/namespaces/{{namespace}}/{each.name}/{{name}}": {
            "patch": {
                "parameters": [parameter],
                "responses": {"200": {"description": "OK"}},
                "x-kubernetes-group-version-kind": {"group": "", "version": "v1", "kind": each.kind},
            }
        }
        for each in RESOURCES.values()
    }
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.33.0"}, "paths": paths}


OPENAPI_ROOT: Object = {"paths": {"api/v1": {"serverRelativeURL": "/openapi/v3/api/v1?hash=0"}}}
