"""The API server of the tests tells of changes as a real one does."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.contracts.waiting import take
from tests.kube.client import PODS, Client, client
from tests.kube.faults import Fault
from tests.kube.server import ApiServer

MERGE = "application/merge-patch+json"


@pytest.fixture
async def kube(api: ApiServer) -> AsyncIterator[Client]:
    """A worker's client of a server whose pods stay as they are."""
    api.faults.hold_pods("unschedulable", times=100)
    async with client(api) as found:
        yield found


async def label(kube: Client, name: str, key: str, value: str | None) -> None:
    """Set a label."""
    await kube.call("PATCH", f"{PODS}/{name}", {"metadata": {"labels": {key: value}}}, kind=MERGE)


async def version(kube: Client) -> str:
    """That of a list now."""
    return str((await kube.call("GET", PODS))["metadata"]["resourceVersion"])


async def test_a_watch_goes_on_from_a_list(kube: Client) -> None:
    """Nothing is missed between the list and the watch, and nothing comes twice."""
    await kube.create("one")
    await kube.phase("one", "Pending")
    start = await version(kube)
    await label(kube, "one", "a", "1")
    async with kube.watching(resourceVersion=start) as events:
        changed, *_ = await take(events, 1)
        assert (changed["type"], changed["object"]["metadata"]["labels"]["a"]) == ("MODIFIED", "1")
        assert int(changed["object"]["metadata"]["resourceVersion"]) > int(start)
        await kube.call("DELETE", PODS + "/one")
        (gone,) = await take(events, 1)
        assert gone["type"] == "DELETED"
        assert int(gone["object"]["metadata"]["resourceVersion"]) > int(
            changed["object"]["metadata"]["resourceVersion"]
        )


async def test_a_watch_without_a_version_begins_with_what_is_there(kube: Client) -> None:
    """Then it goes on."""
    await kube.create("one")
    async with kube.watching(fieldSelector="metadata.name=one") as events:
        assert (await anext(events))["type"] == "ADDED"


async def test_what_leaves_a_selection_is_deleted_from_it(kube: Client) -> None:
    """A watcher with a selector sees pods come and go with their labels."""
    await kube.create("one")
    await kube.phase("one", "Pending")
    async with kube.watching(labelSelector="mine=yes", resourceVersion=await version(kube)) as events:
        await label(kube, "one", "mine", "yes")
        await label(kube, "one", "mine", None)
        assert [event["type"] for event in await take(events, 2)] == ["ADDED", "DELETED"]


async def test_bookmarks_come_while_nothing_happens_and_at_the_end(kube: Client) -> None:
    """With them a client need not come back with a version that is long forgotten."""
    kube.server.rest.bookmark_every = 0.05
    start = await version(kube)
    async with kube.watching(resourceVersion=start, allowWatchBookmarks="true", timeoutSeconds="1") as events:
        seen = [event async for event in events]
    assert {event["type"] for event in seen} == {"BOOKMARK"}
    assert seen[-1]["object"]["metadata"]["resourceVersion"] == start
    assert seen[-1]["object"]["kind"] == "Pod"


async def test_a_version_that_is_forgotten_is_told_as_an_event(kube: Client) -> None:
    """As a real server does it: 200, then ERROR with a Status of 410."""
    start = await version(kube)
    await kube.create("one")
    kube.server.compact()
    async with kube.watching(resourceVersion=start) as events:
        seen = [event async for event in events]
    assert [(event["type"], event["object"]["code"], event["object"]["reason"]) for event in seen] == [
        ("ERROR", 410, "Expired")
    ]


async def test_the_log_is_bounded(kube: Client) -> None:
    """Old changes are forgotten by themselves."""
    etcd = kube.server.etcd
    await kube.create("one")
    for number in range(1_100):
        etcd.change(
            ("pods", "pigeon-sandboxes", "one"),
            kube.server.pod("one")["metadata"]["uid"],
            lambda pod, number=number: pod["metadata"].update(annotations={"n": str(number)}),  # type: ignore[misc]
        )
    assert etcd.revision - etcd.compacted == 1_000


@pytest.mark.parametrize("cut", [0, 1, 100])
async def test_a_watch_is_cut_at_any_byte(kube: Client, cut: int) -> None:
    """The client gets that many bytes and then a broken connection."""
    await kube.create("one")
    kube.server.faults.add(Fault(path="watch=1", cut=cut))
    got = b""
    with pytest.raises(aiohttp.ClientError):  # noqa: PT012 - reading is what breaks
        async with kube.session.get(kube.server.url + PODS, params={"watch": "1"}) as answer:
            async for piece in answer.content.iter_any():
                got += piece
    assert len(got) == cut


async def test_a_forgotten_version_can_be_told_by_http_too(kube: Client) -> None:
    """Some servers answer 410 before any event."""
    kube.server.faults.add(Fault(path="watch=1", status=410))
    refused = await kube.call("GET", PODS, expect=410, watch="1")
    assert refused["reason"] == "Expired"
    await kube.call("GET", PODS, expect=422, watch="1", sendInitialEvents="true")
    await kube.call("GET", PODS, expect=400, watch="1", resourceVersion="abc")
