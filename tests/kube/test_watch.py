"""What is known of a pod, whatever order answers and events come in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from infra.adapters import kube_api
from infra.adapters.kube_api import KubeApi
from infra.adapters.kube_config import Access
from infra.adapters.kube_status import Pod, read
from infra.adapters.kube_watch import PodWatch
from schemas.ports import Phase
from tests.contracts.waiting import soon
from tests.kube.test_api import answering

PHASES = ("Pending", "Running", "Failed")


def raw(version: int, phase: str, uid: str = "u") -> dict[str, Any]:
    """A pod as the server had it at that version."""
    metadata = {
        "name": "one",
        "uid": uid,
        "resourceVersion": str(version),
        "creationTimestamp": "2026-11-23T01:00:00Z",
    }
    state = {"Pending": {}, "Running": {"running": {}}, "Failed": {"terminated": {"exitCode": 137}}}[phase]
    return {
        "metadata": metadata,
        "status": {"phase": phase, "containerStatuses": [{"name": "sandbox", "state": state}]},
    }


@pytest.fixture
async def api() -> AsyncIterator[KubeApi]:
    """A client of a server that nobody runs: what is tried here needs none."""
    async with aiohttp.ClientSession() as session:
        yield KubeApi(Access("http://127.0.0.1:9", None, lambda _: None), session, "n")


HISTORY = st.lists(st.sampled_from(PHASES[:2]), min_size=1, max_size=4).flatmap(
    lambda lived: st.sampled_from([lived, [*lived, "Failed"]])
)


@given(data=st.data())
def test_the_newest_is_what_counts(data: st.DataObject) -> None:
    """Answers overtake events and come twice; an end is told once, and nothing comes back from it."""
    history = [raw(10 + version, phase) for version, phase in enumerate(data.draw(HISTORY))]
    deleted = data.draw(st.booleans())
    heard = data.draw(st.lists(st.sampled_from(history), max_size=8))
    ended: list[Pod] = []
    watch = PodWatch(None, ended.append)  # type: ignore[arg-type]
    position = data.draw(st.integers(0, len(heard)))
    for answer in heard[:position]:
        watch.observe(read(answer))
    for event in history:  # in order, as a watch gives them
        watch._event("MODIFIED", event)
    if deleted:
        watch._event("DELETED", raw(99, "Running"))
    for answer in heard[position:]:
        known = watch.observe(read(answer))
        assert known.version >= int(history[-1]["metadata"]["resourceVersion"])
    assert len(ended) == int(deleted or history[-1]["status"]["phase"] == "Failed")
    assert (watch._gone.get("u") is not None) is deleted
    assert ("u" in watch._pods) is not deleted


async def test_a_change_wakes_who_waits_for_that_pod(api: KubeApi) -> None:
    """And nobody else; who gives up leaves nothing behind."""
    watch = PodWatch(api, lambda _: None)
    one, two = (watch.observe(read(raw(5, "Pending", uid))) for uid in ("u1", "u2"))
    waiting = [asyncio.create_task(watch.change(pod)) for pod in (one, two)]
    await asyncio.sleep(0)
    watch.observe(read(raw(6, "Running", "u1")))
    await soon(waiting[0])
    assert not waiting[1].done()
    waiting[1].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert not watch._waiting
    await soon(watch.change(one))  # it is not the newest any more: there is nothing to wait for
    await soon(watch.change(two, 0.01))
    assert not watch._waiting
    await watch.close()


async def test_what_was_seen_to_go_is_remembered_with_its_reason(api: KubeApi) -> None:
    """Whoever asks a moment late is told why; only the cluster's own doings are told by name."""
    watch = PodWatch(api, lambda _: None)
    taken = raw(7, "Running")
    taken["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]
    watch.observe(read(raw(5, "Running")))
    watch._event("DELETED", taken)
    found = await watch.look("one", "u")
    assert found is not None
    assert (found.phase, "preempted" in found.reason) == (Phase.ENDED, True)
    assert watch.taken("one") == found
    watch._event("DELETED", raw(9, "Running", "u2"))
    assert watch.taken("one") is None
    await watch.close()


async def test_a_cluster_restored_from_a_backup_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its versions are older than ours: a watch from the lost future says nothing, and what is listed then counts."""
    monkeypatch.setattr(kube_api, "WATCH_SILENCE_SECONDS", 0.2)
    asked: list[str] = []

    async def restored(request: web.BaseRequest) -> web.StreamResponse:
        asked.append(request.query.get("resourceVersion", "list"))
        if "watch" not in request.query:
            return web.json_response({"metadata": {"resourceVersion": "20"}, "items": [raw(10, "Pending", "kept")]})
        response = web.StreamResponse()
        await response.prepare(request)
        await asyncio.Event().wait()
        return response

    async with answering(restored) as api:
        watch = PodWatch(api, lambda _: None)
        kept, lost = (watch.observe(read(raw(60, "Running", uid))) for uid in ("kept", "lost"))
        watch._version = "70"
        await soon(asyncio.gather(watch.change(kept), watch.change(lost)))
        found, missing = await watch.look("one", "kept"), await watch.look("one", "lost")
        await watch.close()
    assert found is not None
    assert missing is not None
    assert (found.version, found.phase, missing.phase) == (10, Phase.STARTING, Phase.ENDED)
    assert asked[:2] == ["70", "list"]


async def test_a_pod_that_went_while_it_was_listed_is_not_kept() -> None:
    """Others' answers come between: what they tell of a pod that was there before the list is older than the list."""
    watch: PodWatch

    async def handler(_: web.BaseRequest) -> web.StreamResponse:
        for version, uid in ((15, "old"), (16, "young"), (25, "younger")):
            watch.observe(read(raw(version, "Running", uid)))
        return web.json_response({"metadata": {"resourceVersion": "20"}, "items": []})

    async with answering(handler) as api:
        watch = PodWatch(api, lambda _: None)
        watch.observe(read(raw(10, "Running", "old")))
        assert await watch._list() == "20"
    assert list(watch._pods) == ["younger"]
    assert list(watch._gone) == ["old", "young"]


async def test_who_waits_for_what_is_gone_already_asks_no_faster(api: KubeApi) -> None:
    """A pod that lost our label is told as deleted while the server still has it: its deletion is not polled in a
    busy loop."""
    watch = PodWatch(api, lambda _: None)
    watch._event("DELETED", raw(9, "Running"))
    gone = watch.observe(read(raw(10, "Running")))
    assert gone.phase is Phase.ENDED
    waiting = asyncio.create_task(watch.change(gone, 0.1))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    await soon(waiting)
    await watch.close()
