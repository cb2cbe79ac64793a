"""A cluster's bad moments and a worker's end between two steps: no session is lost, and no end invented, for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from consumers import pool, sweep
from consumers.admission import give_sandbox, spec
from consumers.context import Context
from consumers.controls import Controls
from infra.adapters import kube
from infra.adapters.kube import KubeSandboxes, kube_sandboxes
from infra.adapters.kube_settings import KubeSettings
from schemas.events import CloseReason, SessionClosed, SessionRequested
from schemas.lifecycle import SessionState
from schemas.ports import Phase
from tests.consumers.house import SECRET, House, house, working
from tests.contracts.waiting import soon
from tests.kube.faults import Fault
from tests.kube.server import ApiServer
from tests.waiting import until

PODS = "/pods"
DENIED = 'admission webhook "policy.example.com" denied the request: not now'
LATER = timedelta(minutes=2)  # when the sweep looks at orphans, and at starts without a sandbox


def on_pods(whole: House, sandboxes: KubeSandboxes) -> House:
    """The same deployment with pods for sandboxes."""
    context: Context = replace(whole.fellow(), sandboxes=sandboxes, controls=Controls(sandboxes, SECRET))
    return House(context, whole.clock, whole.hired)


@pytest.fixture
async def cluster(tmp_path: Path, python: Path, settings: KubeSettings) -> AsyncIterator[House]:
    """A deployment on the API server without a worker."""
    async with house(tmp_path / "state", python) as whole, kube_sandboxes(settings) as sandboxes:
        pods = on_pods(whole, sandboxes)
        yield pods
        await pods.context.controls.close()


@pytest.mark.parametrize("status", [403, 422])
async def test_a_delete_that_is_refused_changes_no_end(api: ApiServer, cluster: House, status: int) -> None:
    """A policy of the cluster refuses it once: the session is closed as its user asked, and its pod goes."""
    async with working(cluster.context):
        session = await cluster.ready()
        api.faults.add(Fault("DELETE", PODS, status=status, message=DENIED))
        await cluster.publish(SessionClosed(reason=CloseReason.USER), session)
        await cluster.until_state(session, SessionState.CLOSED)
        assert await cluster.context.sandboxes.list() == []


async def test_a_read_that_is_refused_ends_no_session(api: ApiServer, cluster: House) -> None:
    """Something between us and the API server says no for a moment, when a connection breaks: the session goes on."""
    api.faults.add(Fault("GET", "/exec", cut=3_000))
    async with working(cluster.context):
        session = await cluster.ready()
        pod = f"{PODS}/{(await cluster.session(session)).pod_name}"
        refused = api.faults.add(Fault("GET", pod, status=403, message="Forbidden", times=3))
        command = await cluster.submit(session, "seq 1 2000")
        assert (await cluster.ended(session, command)).exit_code == 0
        assert b"\r\n1999\r\n2000\r\n" in await cluster.transcript(session)
        assert refused.hits == 3


async def test_a_starter_without_room_leaves_a_session_that_has_a_sandbox(api: ApiServer, cluster: House) -> None:
    """Two starters of one session: the one that hears of no room last does not put it back into the queue."""
    session = await cluster.record()
    await cluster.handle(SessionRequested(user_id="alice"), session)
    named = await cluster.session(session)
    assert named.pod_uid
    slow = named.model_copy(update={"pod_uid": "", "pod_name": ""})
    api.faults.add(Fault("GET", "labelSelector", status=403, message="x is forbidden: u cannot list resource pods"))
    assert not await give_sandbox(cluster.context, session, slow)
    after = await cluster.session(session)
    assert (after.state, after.pod_uid) == (SessionState.STARTING, named.pod_uid)


async def test_a_worker_that_dies_while_it_gives_a_place_back_costs_no_session(api: ApiServer, cluster: House) -> None:
    """The pod that found no node is deleted, the session not yet back in the queue: the next tender puts it there."""
    held = api.faults.hold_pods("unschedulable")
    session = await cluster.record()
    await cluster.handle(SessionRequested(user_id="alice"), session)
    named = await cluster.session(session)
    await cluster.context.sandboxes.delete(named.pod_name, named.pod_uid)  # and there its worker dies
    held.lift()
    async with working(cluster.context):

        async def back() -> bool:
            return (await cluster.session(session)).pod_uid != named.pod_uid

        await until(back, "the session waits for another sandbox")
        await cluster.tick()
        await cluster.until_state(session, SessionState.READY)
        assert (await cluster.run(session, "echo here"))[1] == b"here\r\n"


async def test_a_pod_that_ended_before_its_session_heard_of_it_is_replaced(api: ApiServer, cluster: House) -> None:
    """The create's answers were lost, and the pod was evicted meanwhile: nobody was in it, so another is made."""
    session = await cluster.record(state=SessionState.STARTING)
    made = await cluster.context.sandboxes.create(spec(cluster.context, session, None))
    await soon(cluster.context.sandboxes.running(made.name, made.uid))
    await api.kubelet.evict(made.name)
    cluster.clock.forward(LATER)
    async with working(cluster.context):
        await cluster.tick()
        ready = await cluster.until_state(session, SessionState.READY)
        assert ready.pod_uid != made.uid


async def test_a_warm_pod_on_a_dead_node_holds_nobody_up(
    api: ApiServer, settings: KubeSettings, tmp_path: Path, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is deleted when its node is given up; the pool is filled beside it, and the tick goes on."""
    monkeypatch.setattr(pool, "DISCARD_SECONDS", 0.5)
    async with house(tmp_path / "own", python, pool_size=1) as whole, kube_sandboxes(settings) as sandboxes:
        pooled = on_pods(whole, sandboxes)
        await soon(pooled.tick())
        (warm,) = await sandboxes.list()
        await soon(sandboxes.running(warm.name, warm.uid))
        await api.kubelet.lose_node(warm.name)
        await soon(pooled.tick())
        living = [each for each in await sandboxes.list() if each.phase is not Phase.ENDED]
        assert len(living) == 1
        api.kubelet.collect_garbage(warm.name)


async def test_a_pod_on_a_dead_node_does_not_keep_the_queue_waiting(
    api: ApiServer, cluster: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An orphan that its node cannot confirm the end of: who waits is admitted in the same tick, not a minute later."""
    monkeypatch.setattr(sweep, "CLEANING_SECONDS", 0.5)
    orphan = await cluster.context.sandboxes.create(spec(cluster.context, "s-nobody", None, name="orphan"))
    await soon(cluster.context.sandboxes.running(orphan.name, orphan.uid))
    await api.kubelet.lose_node(orphan.name)
    session = await cluster.record(state=SessionState.QUEUED, queued_at=cluster.clock.now())
    cluster.clock.forward(LATER)
    ticking = asyncio.create_task(cluster.tick())
    try:
        await until(lambda: _named(cluster, session), "the session has a sandbox", patience=20.0)
    finally:
        api.kubelet.collect_garbage(orphan.name)
        await soon(ticking)


async def _named(whole: House, session: str) -> bool:
    return bool((await whole.session(session)).pod_uid)


async def test_a_dead_watch_does_not_hold_up_a_start(
    api: ApiServer, cluster: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something buffers what the API server streams: a pod that runs is seen to run all the same."""
    monkeypatch.setattr(kube, "START_LOOK_SECONDS", 0.5)
    dead = api.faults.add(Fault("GET", "watch=1", freeze=0, times=1_000))
    async with working(cluster.context):
        await cluster.ready()
        assert dead.hits
