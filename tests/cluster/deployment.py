"""The product as a deployment puts it into a cluster, under names of its own; its worker runs beside the tests."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from infra.adapters.kube_pod import SESSION_LABEL
from infra.kubernetes.builds import FOLDER, kustomize
from tests.cluster.cluster import Cluster, Object

OVERLAY = FOLDER / "overlays" / "dev"
LEFT_OUT = ("Deployment", "PodDisruptionBudget")  # of the worker, which is started by each test
RENAMED = ("Namespace", "PriorityClass")  # what a cluster has once for all
ADOPTED = ("PIGEON_KUBE_", "PIGEON_LIMITS_")  # of the deployed worker's environment


@dataclass(frozen=True, slots=True)
class Deployment:
    """The sandboxes' namespace and the worker's, as the cluster's administrator; what a worker is started with."""

    sandboxes: Cluster
    system: Cluster
    worker: Path  # a kubeconfig with the rights of the worker's account
    environment: dict[str, str]

    def pods(self) -> list[Object]:
        """Every pod of the sandboxes' namespace, those that are going included."""
        found: list[Object] = json.loads(self.sandboxes.kubectl("get", "pods", "-o", "json"))["items"]
        return found

    def sessions(self) -> list[str]:
        """The sessions that have a pod."""
        return [session for each in self.pods() if (session := each["metadata"]["labels"].get(SESSION_LABEL))]

    def pod(self, session: str) -> Object:
        """The one pod of a session."""
        (found,) = [each for each in self.pods() if each["metadata"]["labels"].get(SESSION_LABEL) == session]
        return found

    def account(self, name: str) -> str:
        """The user name of a service account."""
        namespace = self.sandboxes.namespace if name == "sandbox" else self.system.namespace
        return f"system:serviceaccount:{namespace}:{name}"

    def leftovers(self) -> list[str]:
        """The names of the pods that are there; they are removed, so that the next test does not meet them."""
        names = [each["metadata"]["name"] for each in self.pods()]
        if names:
            self.sandboxes.kubectl("delete", "pods", "--all", "--grace-period=0", "--force")
        return names


@contextmanager
def deployed(kubeconfig: Path, folder: Path) -> Iterator[Deployment]:
    """Apply the manifests for development under unique names, and take all of it away again.

    `folder` keeps the worker's kubeconfig. Raises KubectlFailed.
    """
    objects = list(yaml.safe_load_all(kustomize(OVERLAY)))
    names = _names(objects, secrets.token_hex(4))
    objects = [_renamed(each, names) for each in objects if each["kind"] not in LEFT_OUT]
    everywhere = Cluster(kubeconfig, "")
    sandboxes, system = (Cluster(kubeconfig, names[name]) for name in ("pigeon-sandboxes", "pigeon"))
    mine = [f"{each['kind']}/{each['metadata']['name']}" for each in objects if each["kind"] in RENAMED]
    try:
        everywhere.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(objects))
        sandboxes.kubectl("wait", "--for=jsonpath={.status.hard.pods}=5", "resourcequota/sandboxes", "--timeout=60s")
        worker = system.worker_kubeconfig(folder / "kubeconfig")
        yield Deployment(sandboxes, system, worker, _environment(objects, names, worker))
    finally:
        everywhere.kubectl("delete", "--ignore-not-found", "--timeout=100s", *mine)


def _names(objects: list[Object], run: str) -> dict[str, str]:
    """What each name of a cluster's own object becomes."""
    found = [each["metadata"]["name"] for each in objects if each["kind"] in RENAMED]
    return {name: name.replace("pigeon", f"pigeon-test-{run}", 1) for name in found}


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [_renamed(each, names) for each in value]
    return names.get(value, value) if isinstance(value, str) else value


def _environment(objects: list[Object], names: Mapping[str, str], worker: Path) -> dict[str, str]:
    """The deployed worker's environment, as far as it is about pods; an image of one's own wins."""
    (configuration,) = [
        each["data"] for each in objects if each["kind"] == "ConfigMap" and "PIGEON_KUBE_IMAGE" in each["data"]
    ]
    image = os.environ.get("PIGEON_KUBE_IMAGE")
    return {
        **{name: value for name, value in configuration.items() if name.startswith(ADOPTED)},
        **({"PIGEON_KUBE_IMAGE": image} if image else {}),
        "PIGEON_SANDBOXES": "kubernetes",
        "PIGEON_KUBE_ACCESS": "kubeconfig",
        "PIGEON_KUBE_KUBECONFIG": str(worker),
        "PIGEON_KUBE_NAMESPACE": names["pigeon-sandboxes"],
        "PIGEON_KUBE_PRIORITY_CLASS": names["pigeon-session"],
        "PIGEON_KUBE_WARM_PRIORITY_CLASS": names["pigeon-warm"],
    }
