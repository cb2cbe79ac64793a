"""What the API server checks of a pod, and what it fills in."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

import kubernetes_validate  # type: ignore[import-untyped]

from tests.kube.answers import Object, Refused, invalid
from tests.kube.quantities import quantity

VERSION = "1.33"
DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
DNS_SUBDOMAIN = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
LABEL_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
MUTABLE = ("activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds")
RESTRICTED = "pod-security.kubernetes.io/enforce"


def check_shape(thing: Object) -> None:
    """Raise Refused with 400 when it has fields that its kind does not have, or of another type."""
    try:
        kubernetes_validate.validate(thing, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        where = ".".join(map(str, error.path))
        raise Refused(400, f"{thing.get('kind')} in version v1 cannot be handled: {where}: {error.message}") from error


def check_metadata(thing: Object) -> None:
    """Raise Refused with 422 when name, labels or annotations are not well-formed."""
    kind, metadata = thing["kind"], thing["metadata"]
    name = metadata["name"]
    if not DNS_SUBDOMAIN.fullmatch(name):
        raise invalid(
            kind, name, "metadata.name", "a lowercase RFC 1123 subdomain must consist of a-z, 0-9, '-' or '.'"
        )
    for key, value in (metadata.get("labels") or {}).items():
        if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
            raise invalid(kind, name, "metadata.labels", f"Invalid value: {key}={value}")
    for key in metadata.get("annotations") or {}:
        if not LABEL_KEY.fullmatch(key):
            raise invalid(kind, name, "metadata.annotations", f"Invalid value: {key}")


def defaulted(pod: Object) -> Object:
    """With what the API server and its admission plugins fill in."""
    filled = copy.deepcopy(pod)
    spec = filled["spec"]
    for field, value in (
        ("restartPolicy", "Always"),
        ("terminationGracePeriodSeconds", 30),
        ("dnsPolicy", "ClusterFirst"),
        ("schedulerName", "default-scheduler"),
        ("securityContext", {}),
        ("enableServiceLinks", True),
        ("serviceAccountName", "default"),
    ):
        spec.setdefault(field, value)
    spec["serviceAccount"] = spec["serviceAccountName"]
    for container in spec["containers"]:
        container.setdefault("imagePullPolicy", "IfNotPresent" if ":" in container.get("image", "") else "Always")
        container.setdefault("terminationMessagePath", "/dev/termination-log")
        container.setdefault("terminationMessagePolicy", "File")
        resources = container.setdefault("resources", {})
        if "limits" in resources:
            resources["requests"] = {**resources["limits"], **resources.get("requests", {})}
    if spec.get("automountServiceAccountToken", True):
        _mount_token(spec)
    return filled


def _mount_token(spec: Object) -> None:
    source = {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}}
    volume = {"name": "kube-api-access", "projected": {"defaultMode": 420, "sources": [source]}}
    spec.setdefault("volumes", []).append(volume)
    mount = {"name": "kube-api-access", "readOnly": True, "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}
    for container in spec["containers"]:
        container.setdefault("volumeMounts", []).append(mount)


def check_pod(pod: Object) -> None:
    """Raise Refused with 422 on the first thing that a real API server would refuse."""
    for field, problem in _problems(pod["spec"]):
        raise invalid("Pod", pod["metadata"]["name"], field, problem)


def _problems(spec: Object) -> Iterator[tuple[str, str]]:
    if not spec.get("containers"):
        yield "spec.containers", "Required value"
    if spec.get("restartPolicy") != "Never":
        yield "spec.restartPolicy", "this server runs pods that are never restarted only"
    if (spec.get("activeDeadlineSeconds") or 1) < 1:
        yield "spec.activeDeadlineSeconds", "must be between 1 and 2147483647, inclusive"
    volumes = [volume["name"] for volume in spec.get("volumes") or []]
    if len(set(volumes)) < len(volumes):
        yield "spec.volumes", "Duplicate value"
    for index, container in enumerate(spec.get("containers") or []):
        yield from _container_problems(f"spec.containers[{index}]", container, volumes)


def _container_problems(path: str, container: Object, volumes: list[str]) -> Iterator[tuple[str, str]]:
    if not DNS_LABEL.fullmatch(container["name"]):
        yield f"{path}.name", "a lowercase RFC 1123 label must consist of a-z, 0-9 or '-'"
    if not container.get("image"):
        yield f"{path}.image", "Required value"
    mounts = container.get("volumeMounts") or []
    for mount in mounts:
        if mount["name"] not in volumes:
            yield f"{path}.volumeMounts", f'Not found: "{mount["name"]}"'
    if len({mount["mountPath"] for mount in mounts}) < len(mounts):
        yield f"{path}.volumeMounts", "must be unique"
    resources = container.get("resources") or {}
    for name, request in (resources.get("requests") or {}).items():
        try:
            over = name in resources.get("limits", {}) and quantity(request) > quantity(resources["limits"][name])
        except (ValueError, ArithmeticError):
            yield f"{path}.resources", "quantities must match the regular expression"
            continue
        if over:
            yield f"{path}.resources.requests", f"must be less than or equal to {name} limit"


def check_update(old: Object, new: Object) -> None:
    """Raise Refused with 422 when an update changes what of a pod is fixed."""
    name = old["metadata"]["name"]
    before, after = copy.deepcopy(old["spec"]), copy.deepcopy(new["spec"])
    for field in MUTABLE:
        before.pop(field, None)
        after.pop(field, None)
    for spec in (before, after):
        for container in spec["containers"]:
            container.pop("image", None)
    if before != after:
        raise invalid("Pod", name, "spec", f"Forbidden: pod updates may not change fields other than {MUTABLE}")


def insecurities(spec: Object) -> list[str]:
    """What Pod Security `restricted` refuses of it, in its words."""
    found: set[str] = set()
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            found.add("host namespaces")
    if any("hostPath" in volume for volume in spec.get("volumes") or []):
        found.add("restricted volume types")
    whole = spec.get("securityContext") or {}
    for container in spec["containers"]:
        own = container.get("securityContext") or {}
        if own.get("privileged"):
            found.add("privileged")
        if own.get("allowPrivilegeEscalation") is not False:
            found.add("allowPrivilegeEscalation != false")
        if "ALL" not in (own.get("capabilities") or {}).get("drop", []):
            found.add("unrestricted capabilities")
        if not own.get("runAsNonRoot", whole.get("runAsNonRoot")):
            found.add("runAsNonRoot != true")
        if own.get("runAsUser", whole.get("runAsUser", 1)) == 0:
            found.add("runAsUser=0")
        if (own.get("seccompProfile") or whole.get("seccompProfile") or {}).get("type") not in (
            "RuntimeDefault",
            "Localhost",
        ):
            found.add("seccompProfile")
    return sorted(found)
