"""Admission by ResourceQuota, as its controller counts."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from tests.kube.answers import Object, forbidden
from tests.kube.quantities import quantity, requested, written

ENDED = ("Succeeded", "Failed")


def admit(pod: Object, pods: Sequence[Object], quotas: Sequence[Object]) -> None:
    """Raise Refused with 403 when the pod would exceed a quota, or does not say what the quota counts."""
    for quota in quotas:
        if _in_scope(quota, pod):
            _admit(pod, [each for each in pods if _in_scope(quota, each)], quota)


def _admit(pod: Object, pods: Sequence[Object], quota: Object) -> None:
    name, hard = quota["metadata"]["name"], quota["spec"].get("hard", {})
    asked = {resource: _usage(pod, resource) for resource in hard}
    if missing := [resource for resource in hard if asked[resource] is None]:
        who = pod["metadata"]["name"]
        raise forbidden("pods", who, f"failed quota: {name}: must specify {','.join(sorted(missing))}")
    used = {resource: sum((_usage(each, resource) or Decimal(0) for each in pods), Decimal(0)) for resource in hard}
    over = [each for each in sorted(hard) if (asked[each] or 0) + used[each] > quantity(hard[each])]
    if over:
        raise forbidden(
            "pods",
            pod["metadata"]["name"],
            f"exceeded quota: {name}, requested: {_told(over, hard, asked)}, "
            f"used: {_told(over, hard, used)}, limited: {_told(over, hard, hard)}",
        )


def _told(resources: Sequence[str], hard: Object, amounts: Object) -> str:
    return ",".join(f"{each}={written(quantity(amounts[each]), hard[each])}" for each in resources)


def _usage(pod: Object, resource: str) -> Decimal | None:
    if resource == "count/pods":
        return Decimal(1)
    if pod.get("status", {}).get("phase") in ENDED:
        return Decimal(0)
    if resource == "pods":
        return Decimal(1)
    kind, _, of = resource.partition(".")
    if kind in ("requests", "limits"):
        return requested(pod, kind, of)
    return requested(pod, "requests", resource)


def _in_scope(quota: Object, pod: Object) -> bool:
    """Only the scope PriorityClass is known, by name."""
    expressions = quota["spec"].get("scopeSelector", {}).get("matchExpressions", [])
    return all(_matches(expression, pod) for expression in expressions)


def _matches(expression: Object, pod: Object) -> bool:
    if expression["scopeName"] != "PriorityClass":
        raise ValueError(f"this server does not know the scope {expression['scopeName']}")
    priority, operator = pod["spec"].get("priorityClassName", ""), expression["operator"]
    if operator == "Exists":
        return bool(priority)
    if operator == "DoesNotExist":
        return not priority
    return (priority in expression["values"]) is (operator == "In")
