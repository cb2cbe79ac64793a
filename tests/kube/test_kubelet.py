"""The kubelet of the tests writes statuses as a real one does, from the ends of real sandboxes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from infra.local.sandbox_record import OF
from tests.contracts.waiting import soon
from tests.kube.answers import Object
from tests.kube.client import BEGINNING, PODS, Client, client
from tests.kube.server import NAMESPACE, ApiServer


@pytest.fixture
async def kube(api: ApiServer) -> AsyncIterator[Client]:
    """A worker's client."""
    async with client(api) as found:
        yield found


def state(pod: Object) -> tuple[str, str]:
    """The container's state and its reason."""
    ((name, value),) = pod["status"]["containerStatuses"][0]["state"].items()
    return name, value.get("reason", "")


def conditions(pod: Object) -> dict[str, tuple[str, str]]:
    """The conditions, each with status and reason."""
    return {each["type"]: (each["status"], each.get("reason", "")) for each in pod["status"]["conditions"]}


async def statuses(kube: Client, name: str, until: str) -> list[Object]:
    """The pod at every change until this phase."""
    seen: list[Object] = []
    async with kube.watching(fieldSelector=f"metadata.name={name}", resourceVersion=BEGINNING) as events:
        async for event in events:
            seen.append(event["object"])
            if event["object"]["status"]["phase"] == until:
                return seen
    raise AssertionError("the watch ended")


async def test_a_pod_goes_the_usual_way_to_running(kube: Client) -> None:
    """Pending, scheduled, being created, running, ready."""
    await kube.create("one")
    seen = await statuses(kube, "one", "Running")
    assert [("conditions" in pod["status"], "containerStatuses" in pod["status"]) for pod in seen] == [
        (False, False),
        (True, False),
        (True, True),
        (True, True),
    ]
    assert conditions(seen[1]) == {"PodScheduled": ("True", "")}
    assert state(seen[2]) == ("waiting", "ContainerCreating")
    assert state(seen[3]) == ("running", "")
    assert conditions(seen[3])["Ready"] == ("True", "")


async def test_a_probed_pod_is_ready_once_its_agent_speaks(kube: Client) -> None:
    """It runs before that."""
    probe = {"exec": {"command": ["true"]}}
    await kube.create("one", containers=[{"name": "main", "image": "example:1", "readinessProbe": probe}])
    async with kube.watching(resourceVersion=BEGINNING) as events:
        ready = [
            conditions(event["object"])["Ready"][0] == "True"
            async for event in _until_ready(events)
            if event["object"]["status"]["phase"] == "Running"
        ]
    assert ready == [False, True]


async def _until_ready(events: AsyncIterator[Object]) -> AsyncIterator[Object]:
    async for event in events:
        yield event
        if ("Ready", "True") in {(kind, status) for kind, (status, _) in conditions_of(event).items()}:
            return


def conditions_of(event: Object) -> dict[str, tuple[str, str]]:
    """Of an event's pod, which may have none yet."""
    return conditions(event["object"]) if "conditions" in event["object"]["status"] else {}


async def test_a_pod_without_room_says_so_until_there_is(kube: Client) -> None:
    """The scheduler's words are in a condition."""
    held = kube.server.faults.hold_pods("unschedulable")
    await kube.create("one")
    async with kube.watching(resourceVersion=BEGINNING) as events:
        async for event in events:
            if found := conditions_of(event):
                assert found == {"PodScheduled": ("False", "Unschedulable")}
                break
    held.lift()
    await kube.phase("one", "Running")


async def test_an_image_that_cannot_be_pulled_is_backed_off_from(kube: Client) -> None:
    """The message says what the registry said."""
    held = kube.server.faults.hold_pods("image", message="not found")
    await kube.create("one")
    async with kube.watching(resourceVersion=BEGINNING) as events:
        async for event in events:
            waiting = event["object"]["status"].get("containerStatuses", [{"state": {}}])[0]["state"].get("waiting", {})
            if waiting.get("reason") == "ImagePullBackOff":
                assert "not found" in waiting["message"]
                break
    held.lift()
    await kube.phase("one", "Running")


async def test_a_node_may_refuse_what_the_scheduler_sent(kube: Client) -> None:
    """The pod fails without having had a container."""
    kube.server.faults.hold_pods("refused")
    await kube.create("one")
    failed = await kube.phase("one", "Failed")
    assert failed["status"]["reason"] == "OutOfmemory"
    assert "containerStatuses" not in failed["status"]


async def test_a_missing_config_map_is_waited_for(kube: Client) -> None:
    """As long as a volume's ConfigMap is missing, the container is being created."""
    volume = {"name": "agent", "configMap": {"name": "agent"}}
    await kube.create("one", volumes=[volume])
    async with kube.watching(resourceVersion=BEGINNING) as events:
        async for event in events:
            if "containerStatuses" in event["object"]["status"]:
                assert state(event["object"]) == ("waiting", "ContainerCreating")
                break
    thing = {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "agent"}, "data": {}}
    async with client(kube.server, "admin-token") as admin:
        await admin.call("POST", f"/api/v1/namespaces/{NAMESPACE}/configmaps", thing, expect=201)
    await kube.phase("one", "Running")


async def test_a_killed_agent_is_an_error_with_its_signal(kube: Client) -> None:
    """128 and the signal's number."""
    await kube.create("one")
    await kube.phase("one", "Running")
    await kube.server.kubelet.kill("one")
    failed = await kube.phase("one", "Failed")
    assert state(failed) == ("terminated", "Error")
    assert failed["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 137


async def test_a_deadline_fails_the_pod(kube: Client) -> None:
    """activeDeadlineSeconds is the kubelet's to keep."""
    await kube.create("one", activeDeadlineSeconds=1)
    failed = await kube.phase("one", "Failed")
    assert failed["status"]["reason"] == "DeadlineExceeded"


async def test_memory_eviction_and_shutdown_are_named(kube: Client) -> None:
    """Each stays in the API with its own words."""
    kubelet = kube.server.kubelet
    for name in ("oom", "evicted", "shut"):
        await kube.create(name)
        await kube.phase(name, "Running")
    await kubelet.out_of_memory("oom")
    await kubelet.evict("evicted")
    await kubelet.shut_down_node("shut")
    assert state(await kube.phase("oom", "Failed")) == ("terminated", "OOMKilled")
    evicted = await kube.phase("evicted", "Failed")
    assert (evicted["status"]["reason"], state(evicted)) == ("Evicted", ("terminated", "Error"))
    shut = await kube.phase("shut", "Failed")
    assert conditions(shut)["DisruptionTarget"] == ("True", "TerminationByKubelet")


async def test_a_preempted_pod_is_deleted_with_the_reason_told(kube: Client) -> None:
    """Its last state still says why."""
    await kube.create("one", terminationGracePeriodSeconds=2)
    await kube.phase("one", "Running")
    kube.server.kubelet.preempt("one")
    assert conditions(await kube.gone("one"))["DisruptionTarget"] == ("True", "PreemptionByScheduler")


async def test_a_pod_of_a_lost_node_goes_only_when_it_is_cleared_away(kube: Client) -> None:
    """Nobody confirms its end, so a graceful delete does not end."""
    await kube.create("one")
    await kube.phase("one", "Running")
    await kube.server.kubelet.lose_node("one")
    await kube.call("DELETE", PODS + "/one", {"gracePeriodSeconds": 1})
    left = await kube.call("GET", PODS + "/one")
    assert conditions(left)["Ready"] == ("False", "NodeNotReady")
    assert "deletionTimestamp" in left["metadata"]
    async with kube.executing("one", ["agent", "attach", "--socket", "@agent"]) as socket:
        assert b"i/o timeout" in await soon(socket.receive_bytes())
    kube.server.kubelet.collect_garbage("one")
    assert conditions(await kube.gone("one"))["DisruptionTarget"] == ("True", "DeletionByPodGC")


async def test_a_deletion_waits_for_the_agent_to_end(kube: Client) -> None:
    """The pod is marked at once and removed once nothing of it runs."""
    await kube.create("one")
    await kube.phase("one", "Running")
    sandbox = kube.server.kubelet.find("one").sandbox
    assert sandbox is not None
    answer = await kube.call("DELETE", PODS + "/one", {"gracePeriodSeconds": 20})
    assert "deletionTimestamp" in answer["metadata"]
    gone = await kube.gone("one")
    assert state(gone)[0] == "terminated"
    assert await kube.server.kubelet.sandboxes.get(sandbox.name) is None


async def test_deleting_by_force_is_over_at_once(kube: Client) -> None:
    """The API forgets it before the node has ended it."""
    await kube.create("one")
    await kube.phase("one", "Running")
    await kube.call("DELETE", PODS + "/one", {"gracePeriodSeconds": 0})
    await kube.call("GET", PODS + "/one", expect=404)


async def test_nothing_is_left_when_the_server_is_closed(tmp_path: Path, python: Path) -> None:
    """Whatever stage its pods had reached."""
    root = tmp_path / "other"
    async with ApiServer(root, python=python).serving() as server, client(server) as kube:
        await kube.create("one")
        await kube.phase("one", "Running")
        await kube.create("two")
    assert [entry for entry in os.listdir(root) if OF in entry] == []
