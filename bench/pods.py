"""A namespace of a real cluster for the parts that are measured on pods, and the loop on which those run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bench.emulators import Skipped
from infra.adapters.kube import KubeSandboxes
from infra.adapters.kube_api import KubeApi, kube_api
from infra.adapters.kube_settings import SMALL, KubeSettings, Size
from schemas.limits import MIB
from schemas.ports import Sandbox, SandboxSpec
from tests.cluster.cluster import IMAGE, Cluster, KubectlFailed, namespace

T = TypeVar("T")

WORKSPACE = 256 * MIB
NODE = ("kube-apiserver", "kubelet", "containerd", "containerd-shim")  # what carries the bytes of an exec


@dataclass(frozen=True, slots=True)
class Pods:
    """A worker's client of a namespace that is nobody else's."""

    runner: asyncio.Runner
    cluster: Cluster
    settings: KubeSettings
    api: KubeApi
    sandboxes: KubeSandboxes

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it to its end on the loop of these clients."""
        return self.runner.run(work)

    def variables(self) -> dict[str, str]:
        """What a stack is told so that its sandboxes are pods here."""
        return {"PIGEON_SANDBOXES": "kubernetes", "PIGEON_KUBE": self.settings.model_dump_json(exclude_unset=True)}

    def kubectl(self, *words: str) -> list[str]:
        """A command of the real client."""
        where = ("--kubeconfig", str(self.settings.kubeconfig), "--namespace", self.settings.namespace)
        return ["kubectl", *where, *words]

    async def of(self, session: str) -> Sandbox:
        """The pod of a session."""
        (found,) = await self.sandboxes.find(session)
        return found


def spec(name: str, size: Size = SMALL) -> SandboxSpec:
    """A sandbox of that size for a session of the same name."""
    return SandboxSpec(
        name=name,
        session=name,
        memory_bytes=size.memory_bytes,
        workspace_bytes=WORKSPACE,
        processes=128,
        file_bytes=WORKSPACE,
        lifetime_seconds=3600,
    )


@contextmanager
def pods(folder: Path) -> Iterator[Pods]:
    """A namespace with what a deployment puts there, removed in the end. Raises Skipped where there is no cluster."""
    if not os.environ.get("KUBECONFIG"):
        raise Skipped("KUBECONFIG names no cluster (make cluster)")
    folder.mkdir()
    try:
        with namespace(Path(os.environ["KUBECONFIG"])) as cluster, asyncio.Runner() as runner:
            cluster.kubectl("delete", "resourcequota", "sessions")  # the tests' own, of a few pods
            path = cluster.worker_kubeconfig(folder / "kubeconfig")
            image = os.environ.get("PIGEON_KUBE_IMAGE", IMAGE)
            settings = KubeSettings(access="kubeconfig", kubeconfig=path, namespace=cluster.namespace, image=image)
            held = AsyncExitStack()
            try:
                api = runner.run(held.enter_async_context(kube_api(settings)))
                sandboxes = KubeSandboxes(api, settings)
                held.push_async_callback(sandboxes.close)
                yield Pods(runner, cluster, settings, api, sandboxes)
            finally:
                runner.run(held.aclose())
    except (KubectlFailed, FileNotFoundError) as error:
        raise Skipped(str(error)) from error


def node_processes() -> dict[str, list[int]]:
    """The processes of this machine that carry an exec, by program; none where the node is another machine."""
    found: dict[str, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (name := _program(entry)) in NODE:
            found.setdefault(name, []).append(int(entry.name))
    return found


def _program(entry: Path) -> str:
    """The component that a process is: one binary is several of Kubernetes'."""
    try:
        words = (entry / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    names = [Path(os.fsdecode(word)).name for word in words[:2]]
    return next((name.removesuffix("-runc-v2") for name in names if name.removesuffix("-runc-v2") in NODE), "")
