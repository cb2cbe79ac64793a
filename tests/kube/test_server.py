"""The API server of the tests behaves like one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.kube.client import PODS, Client, client
from tests.kube.server import ApiServer


@pytest.fixture
async def kube(api: ApiServer) -> AsyncIterator[Client]:
    async with client(api) as found:
        yield found


async def test_a_pod_comes_to_run_and_its_agent_speaks_through_exec(kube: Client) -> None:
    """Create, watch, exec: what a session's start is made of."""
    created = await kube.create("one")
    assert created["status"]["phase"] == "Pending"
    running = await kube.phase("one", "Running")
    assert running["metadata"]["uid"] == created["metadata"]["uid"]
    async with kube.executing("one", ["agent", "attach", "--socket", "@agent"]) as socket:
        assert await socket.receive_bytes() == b"\x01"
        assert b'"bootId"' in await socket.receive_bytes()
    await kube.call("DELETE", PODS + "/one", {"gracePeriodSeconds": 5})
    assert (await kube.gone("one"))["metadata"]["uid"] == created["metadata"]["uid"]
