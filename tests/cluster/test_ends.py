"""What a real kubelet and a real scheduler say of a pod is understood."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from infra.adapters.kube import KubeSandboxes, kube_sandboxes
from infra.adapters.kube_settings import KubeSettings
from schemas.errors import NoCapacity, SandboxFailed, SandboxGone
from schemas.ports import Phase
from tests.cluster.cluster import Cluster
from tests.contracts.sandboxes_contract import greeting, spec, started
from tests.contracts.waiting import soon

pytestmark = pytest.mark.slow

PATIENCE = 90.0  # seconds; a kubelet measures disks every ten or so
Client = Callable[..., AbstractAsyncContextManager[KubeSandboxes]]


@pytest.fixture
def client(settings: KubeSettings) -> Client:
    """A worker with other settings, which leaves no pod."""

    @asynccontextmanager
    async def opened(**other: Any) -> AsyncIterator[KubeSandboxes]:
        async with kube_sandboxes(settings.model_copy(update=other)) as sandboxes:
            try:
                yield sandboxes
            finally:
                for left in await sandboxes.list():
                    await sandboxes.delete(left.name, left.uid)

    return opened


@pytest.fixture
def pause(cluster: Cluster) -> str:
    """An image without anything but a program that waits; nodes have one for their own use."""
    nodes = json.loads(cluster.kubectl("get", "nodes", "-o", "json"))["items"]
    names = (name for node in nodes for image in node["status"].get("images", []) for name in image.get("names") or ())
    return next((name for name in names if "pause" in name and "@" not in name), "registry.k8s.io/pause:3.10")


async def test_a_pod_that_no_node_wants_is_a_full_runtime(client: Client) -> None:
    """The session waits in the queue instead of failing."""
    async with client(unschedulable_seconds=2.0, node_selector={"pigeon/no-such": "node"}) as sandboxes:
        made = await sandboxes.create(spec("one", "s-one"))
        with pytest.raises(NoCapacity, match="no node has room"):
            await soon(sandboxes.running("one", made.uid), PATIENCE)


async def test_an_image_without_python_fails(client: Client, pause: str) -> None:
    """At once, with what the runtime said."""
    async with client(allowed_images=(pause,)) as sandboxes:
        made = await sandboxes.create(spec("one", "s-one", image=pause))
        with pytest.raises(SandboxFailed, match=r"could not be started.*python3"):
            await soon(sandboxes.running("one", made.uid), PATIENCE)


async def test_an_image_that_cannot_be_pulled_is_named(client: Client) -> None:
    """Who looks at the sandbox is told what it waits for."""
    async with client(allowed_images=("*",)) as sandboxes:
        made = await sandboxes.create(spec("one", "s-one", image="localhost:1/no/such:image"))

        async def told() -> str:
            found = await sandboxes.get("one")
            while found is not None and "image" not in found.reason:
                looked = await sandboxes._watch.look("one", made.uid)
                assert looked is not None
                await sandboxes._watch.change(looked, 1.0)
                found = await sandboxes.get("one")
            assert found is not None
            return found.reason

        assert "its image cannot be pulled" in await soon(told(), PATIENCE)


async def test_an_injected_agent_serves(client: Client) -> None:
    """Any Python image will do."""
    async with client(inject_agent=True) as sandboxes:
        assert await greeting(sandboxes, await started(sandboxes, "one", "s-one"))


async def test_a_full_disk_ends_its_pod_and_says_so(client: Client) -> None:
    """The kubelet evicts who writes more than the workspace takes, and nobody else."""
    async with client() as sandboxes:
        made, other = await started(sandboxes, "one", "s-one"), await started(sandboxes, "two", "s-two")
        stream = await sandboxes._api.execute("one", ["dd", "if=/dev/zero", "of=/workspace/full", "bs=1M", "count=64"])
        while await soon(stream.read(1_000)):
            pass
        await stream.close()
        ended = await soon(sandboxes.gone("one", made.uid), PATIENCE)
        assert "evicted" in ended.reason
        assert "workspace" in ended.reason
        with pytest.raises(SandboxGone, match="evicted"):
            await sandboxes.connect("one", made.uid)
        assert await greeting(sandboxes, other)
        found = await sandboxes.get("two")
        assert found is not None
        assert found.phase is Phase.RUNNING


async def test_the_cluster_enforces_what_it_says(client: Client) -> None:
    """The namespace takes our pods and no weaker ones."""
    async with client() as sandboxes:
        assert "whose namespace takes no others" in await sandboxes.check_isolation()
        assert await sandboxes.list() == []
    async with client(priority_class="no-such-class") as sandboxes:
        with pytest.raises(SandboxFailed, match="no-such-class"):
            await sandboxes.check_isolation()
