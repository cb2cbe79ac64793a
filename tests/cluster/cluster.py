"""A namespace of its own in a real cluster, with what a deployment puts there, and a worker's rights in it."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from infra.adapters.kube_pod import agent_config_map
from infra.adapters.kube_settings import KubeSettings
from schemas.ports import Sandbox
from tests.contracts.sandboxes_contract import CAPACITY

Object = dict[str, Any]

IMAGE = "docker.io/pigeon/python-terminal:latest"
BASE = Path(__file__).parents[2] / "infra" / "kubernetes" / "base"
PATIENCE = 60.0  # seconds for controllers to act
ROLES = ("Role", "RoleBinding", "ServiceAccount")


class KubectlFailed(Exception):
    """kubectl did not do what it was asked; the message is its own."""


class Cluster:
    """One namespace of one cluster, as its administrator."""

    def __init__(self, kubeconfig: Path, namespace: str) -> None:
        self.kubeconfig = kubeconfig
        self.namespace = namespace

    def kubectl(self, *words: str, stdin: str = "") -> str:
        """What kubectl prints. Raises KubectlFailed."""
        command = ["kubectl", "--kubeconfig", str(self.kubeconfig), "--namespace", self.namespace, *words]
        done = run(command, input=stdin, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            raise KubectlFailed(f"kubectl {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def apply(self, *objects: Object) -> None:
        """Have these objects there."""
        self.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def object(self, kind: str, name: str) -> Object:
        """An object as it is now."""
        found: Object = json.loads(self.kubectl("get", kind, name, "-o", "json"))
        return found

    def worker_kubeconfig(self, path: Path) -> Path:
        """A kubeconfig with the rights of the worker's account and no others."""
        token = self.kubectl("create", "token", "worker", "--duration", "4h").strip()
        config = yaml.safe_load(self.kubectl("config", "view", "--raw", "--minify"))
        config["users"] = [{"name": "worker", "user": {"token": token}}]
        config["contexts"] = [{"name": "w", "context": {"cluster": config["clusters"][0]["name"], "user": "worker"}}]
        config["current-context"] = "w"
        path.write_text(yaml.safe_dump(config))
        path.chmod(0o600)
        return path


def manifests(kinds: Sequence[str], file: str, namespace: str) -> Iterator[Object]:
    """What a deployment puts beside sandboxes, moved to this namespace."""
    for found in yaml.safe_load_all((BASE / file).read_text()):
        if found["kind"] in kinds:
            found["metadata"]["namespace"] = namespace
            for subject in found.get("subjects", []):
                subject["namespace"] = namespace
            yield found


@contextmanager
def namespace(kubeconfig: Path) -> Iterator[Cluster]:
    """A fresh namespace, removed with everything in it; the priority classes stay, they are the cluster's."""
    cluster = Cluster(kubeconfig, f"pigeon-test-{secrets.token_hex(4)}")
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    cluster.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": cluster.namespace, "labels": labels}},
        *yaml.safe_load_all((BASE / "priorities.yaml").read_text()),
    )
    try:
        cluster.apply(
            *manifests(ROLES, "access.yaml", cluster.namespace),
            *manifests(("NetworkPolicy", "LimitRange"), "sandboxes.yaml", cluster.namespace),
            agent_config_map(cluster.namespace),
            _quota(cluster.namespace),
        )
        _await_quota(cluster)
        yield cluster
    finally:
        cluster.kubectl("delete", "namespace", cluster.namespace, "--wait=false")


def _quota(in_namespace: str) -> Object:
    """Room for CAPACITY sessions; warm pods are counted apart."""
    scope = {"scopeName": "PriorityClass", "operator": "In", "values": [KubeSettings().priority_class]}
    return {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "sessions", "namespace": in_namespace},
        "spec": {"hard": {"pods": str(CAPACITY)}, "scopeSelector": {"matchExpressions": [scope]}},
    }


def _await_quota(cluster: Cluster) -> None:
    """A quota holds from its controller's first count on; an account from its creation on."""
    deadline = time.monotonic() + PATIENCE
    while "hard" not in cluster.object("resourcequota", "sessions").get("status", {}):
        assert time.monotonic() < deadline, "the quota is not counted"
        time.sleep(0.1)


class MachineNode:
    """The pods' node, where that is this machine; elsewhere only what the API server tells."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def kill(self, sandbox: Sandbox) -> None:
        """See tests.kube.lab.Node."""
        pids = await asyncio.to_thread(self._agents, sandbox.uid)
        if not pids:
            pytest.skip("the pods' node is another machine")
        os.kill(pids[0], signal.SIGKILL)

    async def traces(self, sandbox: Sandbox) -> set[str]:
        """See tests.kube.lab.Node."""
        return {f"pod {sandbox.name} {sandbox.uid}", *(f"/proc/{pid}" for pid in processes(sandbox.uid))}

    async def still_there(self, traces: set[str]) -> set[str]:
        """See tests.kube.lab.Node."""
        return {trace for trace in traces if await asyncio.to_thread(self._exists, trace)}

    def _agents(self, uid: str) -> list[int]:
        return [pid for pid in processes(uid) if b"serve" in _command(pid)]

    def _exists(self, trace: str) -> bool:
        if not trace.startswith("pod "):
            return Path(trace).exists()
        _, name, uid = trace.split()
        try:
            return str(self._cluster.object("pod", name)["metadata"]["uid"]) == uid
        except KubectlFailed:
            return False


def _command(pid: int) -> list[bytes]:
    """The words of a process's command line; none where it has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def processes(uid: str) -> list[int]:
    """This machine's processes that belong to a pod, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if uid in (entry / "cgroup").read_text():
                    found.append(int(entry.name))
            except OSError:
                continue
    return sorted(found)
