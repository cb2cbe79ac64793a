"""The Kubernetes manifests as tests see them: each build as a list of objects."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from infra.kubernetes.builds import builds
from infra.settings import Settings

Object = dict[str, Any]

SYSTEM, SANDBOXES = "pigeon", "pigeon-sandboxes"
UNITS = {"m": Decimal("0.001"), "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "": Decimal(1)}


@dataclass(frozen=True)
class Build:
    """One build's objects."""

    name: str
    objects: tuple[Object, ...]

    def of(self, kind: str, namespace: str | None = None) -> list[Object]:
        """Every object of a kind, in a namespace if one is given."""
        return [each for each in self.objects if each["kind"] == kind and namespace in (None, namespace_of(each))]

    def one(self, kind: str, name: str, namespace: str | None = None) -> Object:
        """The object of that kind and name; a generated one's name may have a hash at its end."""
        found = [each for each in self.of(kind, namespace) if each["metadata"]["name"].startswith(name)]
        assert len(found) == 1, f"{self.name}: {len(found)} of {kind} {name}"
        return found[0]

    def has(self, component: str) -> bool:
        """Whether the component is part of this build."""
        return component in self.name.split("+") or (component, self.name) in {
            ("network-policy", "dev"),
            ("network-policy", "production"),
            ("autoscaling", "production"),
            ("gvisor", "production"),
        }

    @property
    def configuration(self) -> dict[str, str]:
        """The worker's environment, without its secret."""
        data: dict[str, str] = self.one("ConfigMap", "pigeon-worker")["data"]
        return data

    @property
    def settings(self) -> Settings:
        """What the worker makes of its environment."""
        return Settings.from_environment(self.configuration)

    def pod_templates(self) -> Iterator[Object]:
        """The pod of each workload."""
        for each in self.of("Deployment"):
            yield each["spec"]["template"]


def namespace_of(each: Object) -> str | None:
    """Where it is; None for what belongs to the whole cluster."""
    namespace: str | None = each["metadata"].get("namespace")
    return namespace


def quantity(text: str | int) -> Decimal:
    """A quantity of Kubernetes as a number."""
    number = str(text).rstrip("mKMGi")
    return Decimal(number) * UNITS[str(text)[len(number) :]]


@functools.cache
def every_build() -> tuple[Build, ...]:
    """All builds, made once a run. Skips without kubectl, and fails in CI."""
    if shutil.which("kubectl") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI has no kubectl")
        pytest.skip("needs kubectl 1.27 or newer")
    return tuple(
        Build(name, tuple(each for each in yaml.load_all(text, Loader=yaml.CSafeLoader) if each))
        for name, text in builds()
    )


def build(name: str) -> Build:
    """One build by its name."""
    return next(each for each in every_build() if each.name == name)


def restricted(template: Object) -> list[str]:
    """What Pod Security `restricted` has against a pod, as sentences; empty for one that it admits."""
    spec = template["spec"]
    against = [f"{field} is set" for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field)]
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    for volume in spec.get("volumes", []):
        against += [f"a volume is {kind}" for kind in set(volume) - {"name"} - allowed]
    if "sysctls" in spec.get("securityContext", {}):
        against.append("it sets sysctls")
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        against += [f"{container['name']}: {text}" for text in _against(container, spec.get("securityContext", {}))]
    return against


def _against(container: Object, pod: Object) -> Iterator[str]:
    own = container.get("securityContext", {})
    both = {**pod, **own}
    if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
        yield "may be root"
    if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "has no seccomp profile"
    if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
        yield "may gain privileges"
    capabilities = own.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"] or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "has capabilities"
    if own.get("procMount", "Default") != "Default":
        yield "has an unmasked /proc"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield "has a port of the host"
