"""Sandboxes that take their time, or get no place: what a cluster does and a laptop does not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from consumers.close_session import close_session
from infra.local.sandboxes import LocalSandboxes
from infra.local.store import LocalStore
from schemas.documents import session_path
from schemas.errors import NoCapacity, Unavailable
from schemas.events import CloseReason, SessionClosed, SessionRequested
from schemas.lifecycle import SessionState
from schemas.limits import Limits
from schemas.ports import ByteStream, Sandbox, Snapshot
from tests.consumers.house import House, working
from tests.waiting import until

LIMITS = Limits(pool_size=0, tended_every=timedelta(milliseconds=50))


class Cluster(LocalSandboxes):
    """A runtime that has taken a sandbox and finds it a place only when a test says so."""

    def __init__(self, state: Path, python: Path) -> None:
        super().__init__(state / "sandboxes", limits=LIMITS, python=python)
        self.place = asyncio.Event()
        self.crowded = False
        self.away = False
        self.refused = 0
        self.streams: list[ByteStream] = []

    async def running(self, name: str, uid: str) -> Sandbox:
        if self.crowded:
            raise NoCapacity(f"sandbox {name} found no place")
        going = asyncio.create_task(self.gone(name, uid))
        placed = asyncio.create_task(self.place.wait())
        await asyncio.wait((going, placed), return_when=asyncio.FIRST_COMPLETED)
        for task in (going, placed):
            task.cancel()
        return await super().running(name, uid)

    async def get(self, name: str) -> Sandbox | None:
        if self.away:
            raise Unavailable("the API server does not answer")
        found = await super().get(name)
        return found and replace(found, reason=found.reason or "its image cannot be pulled")

    async def connect(self, name: str, uid: str) -> ByteStream:
        if self.away:
            self.refused += 1
            raise Unavailable("the API server does not answer")
        self.streams.append(await super().connect(name, uid))
        return self.streams[-1]


@pytest.fixture
def slow(tmp_path: Path, empty_house: House, python: Path) -> tuple[House, Cluster]:
    """A house whose sandboxes are a slow cluster's."""
    cluster = Cluster(tmp_path / "state", python)
    context = replace(empty_house.fellow(), sandboxes=cluster, limits=LIMITS)
    return House(context, empty_house.clock, empty_house.hired), cluster


async def test_a_sandbox_without_a_place_puts_its_session_back_into_the_queue(slow: tuple[House, Cluster]) -> None:
    """It keeps its turn, nothing of the sandbox stays, and it starts as soon as there is room."""
    house, cluster = slow
    cluster.crowded = True
    async with working(house.context):
        session = await house.request()

        async def waits_again() -> bool:
            return (await house.session(session)).state is SessionState.QUEUED and not await cluster.list()

        await until(waits_again, "the session is back in the queue")
        waiting = await house.session(session)
        assert (waiting.pod_name, waiting.pod_uid, waiting.tended_at) == ("", "", None)
        cluster.crowded = False
        cluster.place.set()
        await house.tick()
        ready = await house.until_state(session, SessionState.READY)
        assert ready.queued_at == waiting.queued_at
        assert (await house.run(session, "echo here"))[1] == b"here\r\n"


async def test_a_session_that_starts_slowly_is_seen_to_be_tended(slow: tuple[House, Cluster]) -> None:
    """Nobody else takes it over, however long its sandbox waits for a node."""
    house, cluster = slow
    async with working(house.context):
        session = await house.request()
        signatures = set()

        async def signed_again() -> bool:
            now = await house.session(session)
            if now.epoch == 1:
                signatures.add(now.tended_at)
            return len(signatures) > 2

        await until(signed_again, "its tender signs it while it waits")
        cluster.place.set()
        assert (await house.until_state(session, SessionState.READY)).epoch == 1


async def test_a_session_that_is_closed_while_its_sandbox_waits_ends_at_once(slow: tuple[House, Cluster]) -> None:
    """Whoever closes the page does not leave a pod waiting for a node."""
    house, cluster = slow
    async with working(house.context):
        session = await house.request()
        await house.until_state(session, SessionState.STARTING)
        await until(lambda: _named(house, session), "its sandbox has a name")
        await house.publish(SessionClosed(reason=CloseReason.USER), session)
        closed = await house.until_state(session, SessionState.CLOSED)
    assert (closed.reason, closed.final_offset) == ("user", 0)
    assert await cluster.list() == []


async def test_a_start_that_took_too_long_says_what_it_waited_for(slow: tuple[House, Cluster]) -> None:
    """Whoever chose an image that does not exist reads so."""
    house, _ = slow
    session = await house.record()
    await house.handle(SessionRequested(user_id="alice"), session)
    house.clock.forward(LIMITS.start_timeout + timedelta(seconds=1))
    await house.tick()
    failed = await house.session(session)
    assert failed.state is SessionState.FAILED
    assert failed.reason.endswith(": its image cannot be pulled.")


async def test_a_tender_outlives_a_cluster_that_does_not_answer(slow: tuple[House, Cluster]) -> None:
    """The API server is away while the connection to the agent breaks: the session goes on where it was."""
    house, cluster = slow
    cluster.place.set()
    async with working(house.context):
        session = await house.ready()
        cluster.away = True
        for stream in list(cluster.streams):
            await stream.close()
        cluster.streams.clear()
        command = await house.submit(session, "echo back")
        await until(lambda: asyncio.sleep(0, cluster.refused > 2), "its tender has asked in vain")
        cluster.away = False
        assert (await house.ended(session, command)).exit_code == 0
        assert (await house.session(session)).epoch == 1


class Overtaken(LocalStore):
    """Somebody else writes between this reader's first look and its own write."""

    def __init__(self, store: LocalStore, meanwhile: Callable[[], Awaitable[None]]) -> None:
        self.__dict__.update(store.__dict__)
        self._meanwhile: Callable[[], Awaitable[None]] | None = meanwhile

    async def get(self, path: str) -> Snapshot | None:
        found = await super().get(path)
        if self._meanwhile is not None:
            meanwhile, self._meanwhile = self._meanwhile, None
            await meanwhile()
        return found


async def test_a_close_that_meets_the_way_back_into_the_queue_is_not_forgotten(slow: tuple[House, Cluster]) -> None:
    """A session that its user has closed never starts."""
    house, _ = slow
    session = await house.record()
    await house.handle(SessionRequested(user_id="alice"), session)
    store = house.context.store
    assert isinstance(store, LocalStore)

    async def back() -> None:
        await store.update(session_path(session), {"state": "queued", "podUid": "", "podName": ""})

    closing = replace(house.context, store=Overtaken(store, back))
    await close_session(closing, session, CloseReason.USER)
    assert (await house.session(session)).state is SessionState.CLOSED


async def _named(house: House, session: str) -> bool:
    return bool((await house.session(session)).pod_uid)
