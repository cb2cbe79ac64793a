"""What the API server says besides objects: refusals (`Status`) and tables for people."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

Object = dict[str, Any]

REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    409: "Conflict",
    410: "Expired",
    415: "UnsupportedMediaType",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}


class Refused(Exception):
    """A request that is answered with a `Status` of kind Failure."""

    def __init__(
        self,
        code: int,
        message: str,
        *,
        reason: str = "",
        details: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.headers = dict(headers or {})
        self.status: Object = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason or REASONS.get(code, "Unknown"),
            **({"details": dict(details)} if details else {}),
            "code": code,
        }

    def answer(self) -> web.Response:
        """As an HTTP response."""
        return web.json_response(self.status, status=self.code, headers=self.headers)


def not_found(resource: str, name: str) -> Refused:
    """There is no such object."""
    return Refused(404, f'{resource} "{name}" not found', details={"name": name, "kind": resource})


def invalid(kind: str, name: str, field: str, problem: str) -> Refused:
    """The object breaks a rule of its kind; `field` is the path to what breaks it."""
    cause = {"reason": "FieldValueInvalid", "message": problem, "field": field}
    details = {"name": name, "kind": kind, "causes": [cause]}
    return Refused(422, f'{kind} "{name}" is invalid: {field}: {problem}', details=details)


def forbidden(resource: str, name: str, why: str) -> Refused:
    """Admission refuses it: a quota, a policy."""
    return Refused(403, f'{resource} "{name}" is forbidden: {why}', details={"name": name, "kind": resource})


def modified(resource: str, name: str) -> Refused:
    """An optimistic update came too late."""
    why = "the object has been modified; please apply your changes to the latest version and try again"
    message = f'Operation cannot be fulfilled on {resource} "{name}": {why}'
    return Refused(409, message, details={"name": name, "kind": resource})


def timestamp(at: datetime | None = None) -> str:
    """As the API writes times: UTC, whole seconds."""
    return (at or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")


def table(objects: Sequence[Object], revision: str) -> Object:
    """What kubectl prints; pods have the columns of pods, everything else name and age."""
    pods = bool(objects) and objects[0]["kind"] == "Pod"
    names = ("Name", "Ready", "Status", "Restarts", "Age") if pods else ("Name", "Age")
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {"resourceVersion": revision},
        "columnDefinitions": [
            {
                "name": name,
                "type": "string",
                "format": "name" if name == "Name" else "",
                "description": "",
                "priority": 0,
            }
            for name in names
        ],
        "rows": [{"cells": _cells(each), "object": _metadata_only(each)} for each in objects],
    }


def _metadata_only(thing: Object) -> Object:
    metadata = copy.deepcopy(thing["metadata"])
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata}


def _cells(thing: Object) -> list[str]:
    name, age = thing["metadata"]["name"], _age(thing["metadata"]["creationTimestamp"])
    if thing["kind"] != "Pod":
        return [name, age]
    containers = thing["spec"]["containers"]
    ready = sum(each["ready"] for each in thing["status"].get("containerStatuses", []))
    return [name, f"{ready}/{len(containers)}", shown_status(thing), "0", age]


def shown_status(pod: Object) -> str:
    """The STATUS column: the most telling word there is."""
    status = pod["status"]
    if "deletionTimestamp" in pod["metadata"]:
        return "Terminating"
    for container in status.get("containerStatuses", []):
        state = next(iter(container["state"].values()))
        if "reason" in state:
            return str(state["reason"])
    return str(status.get("reason") or status["phase"])


def _age(created: str) -> str:
    return f"{int((datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds())}s"
