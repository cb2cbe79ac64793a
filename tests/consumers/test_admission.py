"""Giving sandboxes: slow answers, several workers, a pool, and starts that fail."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from consumers.admission import POOL_LIFE, spec
from consumers.rounds import Rounds
from consumers.settlement import DONE
from infra.local.sandboxes import LocalSandboxes
from schemas.events import CloseReason, SessionClosed, SessionRequested, Signal, SignalSent
from schemas.lifecycle import CommandState, SessionState
from schemas.limits import Limits
from schemas.ports import Sandbox, SandboxSpec
from tests.consumers.house import House, house
from tests.waiting import until

LIMITS = Limits()


class LateAnswers(LocalSandboxes):
    """Creates at once and says so late, as an API server under load does."""

    def __init__(self, state: Path, python: Path) -> None:
        super().__init__(state / "sandboxes", limits=LIMITS, python=python)
        self.created, self.answer = asyncio.Event(), asyncio.Event()

    async def create(self, spec: SandboxSpec) -> Sandbox:
        sandbox = await super().create(spec)
        self.created.set()
        await self.answer.wait()
        return sandbox


async def test_a_starter_that_hears_late_leaves_the_running_session_alone(
    tmp_path: Path, empty_house: House, python: Path
) -> None:
    """The sweep started the session again with the very sandbox that the first starter made: it stays."""
    late = LateAnswers(tmp_path / "state", python)
    slow = House(replace(empty_house.fellow(), sandboxes=late), empty_house.clock, empty_house.hired)
    session = await empty_house.record()
    starting = asyncio.create_task(slow.handle(SessionRequested(user_id="alice"), session))
    await late.created.wait()
    empty_house.clock.forward(2 * LIMITS.request_timeout)
    await empty_house.tick()
    await empty_house.hire()
    ready = await empty_house.until_state(session, SessionState.READY)
    late.answer.set()
    assert await starting == DONE
    assert [sandbox.uid for sandbox in await empty_house.context.sandboxes.list()] == [ready.pod_uid]
    assert (await empty_house.run(session, "echo here"))[1] == b"here\r\n"


async def test_the_pool_gives_no_more_sandboxes_than_there_is_room_for(tmp_path: Path, python: Path) -> None:
    """A warm sandbox is not counted until it is claimed; then it is one of those that the capacity bounds."""
    async with house(tmp_path / "state", python, pool_size=1, capacity=1) as pooled:
        await pooled.hire()
        await pooled.ready("alice")
        await pooled.tick()  # the pool is full again
        waiting = await pooled.request("bob")
        await pooled.until_state(waiting, SessionState.QUEUED)
        await pooled.tick()
        assert (await pooled.session(waiting)).state is SessionState.QUEUED


async def test_the_pool_is_filled_again_as_soon_as_a_session_has_taken_from_it(tmp_path: Path, python: Path) -> None:
    """The next user's session is as quick as this one's, without waiting for a tick."""
    async with house(tmp_path / "state", python, pool_size=1) as pooled:
        await pooled.hire()

        async def warm() -> list[Sandbox]:
            return [each for each in await pooled.context.sandboxes.list() if each.session is None]

        (first,) = await until(warm, "a sandbox is warm")
        await pooled.context.sandboxes.running(first.name, first.uid)
        session = await pooled.ready()
        assert (await pooled.session(session)).pod_uid == first.uid
        (second,) = await until(warm, "another sandbox is warm")
        assert second.uid != first.uid


async def test_a_round_that_was_asked_for_is_run_though_the_one_under_way_is_cut_off() -> None:
    """A worker whose lease was lost in the middle of an admission takes nobody's turn with it."""
    rounds, begun, ran = Rounds(), asyncio.Event(), []

    async def stuck() -> None:
        begun.set()
        await asyncio.Event().wait()

    async def work() -> None:
        ran.append(1)

    first = asyncio.create_task(rounds.run(stuck))
    await begun.wait()
    others = [asyncio.create_task(rounds.run(work)) for _ in range(3)]
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(*others)
    assert ran == [1]


async def test_a_session_that_cannot_be_read_holds_up_no_other(empty_house: House) -> None:
    """One document of an unknown shape, due and in the queue: the sweep and the admission go on without it."""
    queued = {"state": SessionState.QUEUED, "queued_at": empty_house.clock.now()}
    broken, healthy = [await empty_house.record(user, **queued) for user in ("alice", "bob")]
    await empty_house.context.store.update(f"sessions/{broken}", {"rows": "many"})
    empty_house.clock.forward(2 * LIMITS.request_timeout)
    await empty_house.tick()
    assert (await empty_house.session(healthy)).state is SessionState.STARTING


async def test_a_session_that_waits_for_its_whole_life_is_closed(tmp_path: Path, python: Path) -> None:
    """Nothing stays in a live state for ever, and no place of its user's is taken for ever."""
    async with house(tmp_path / "state", python, capacity=0) as full:
        session = await full.record()
        await full.handle(SessionRequested(user_id="alice"), session)
        waiting = await full.session(session)
        assert (waiting.state, waiting.deadline) == (SessionState.QUEUED, waiting.expires_at)
        await full.tick()
        assert (await full.session(session)).state is SessionState.QUEUED
        full.clock.forward(LIMITS.session_lifetime)
        await full.tick()
        await full.hire()
        assert (await full.until_state(session, SessionState.CLOSED)).reason == "expired"
        assert await full.live_sessions() == 0


async def test_a_sandbox_outlives_its_session_wherever_it_comes_from(tmp_path: Path, python: Path) -> None:
    """Else a session would be lost at its longest life instead of closed, or early if its sandbox was warm for long."""
    async with house(tmp_path / "state", python, pool_size=1) as pooled:
        await pooled.tick()
        (old,) = await pooled.context.sandboxes.list()
        needed = POOL_LIFE + LIMITS.session_lifetime + LIMITS.closing_grace
        assert spec(pooled.context, None, None, "pool").lifetime_seconds > needed.total_seconds()
        pooled.clock.forward(POOL_LIFE)
        session = await pooled.record()
        await pooled.handle(SessionRequested(user_id="alice"), session)
        assert (await pooled.session(session)).pod_uid != old.uid
        await pooled.tick()
        (warm,) = [sandbox for sandbox in await pooled.context.sandboxes.list() if sandbox.session is None]
        assert warm.uid != old.uid


class Redeployed(LocalSandboxes):
    """A runtime whose image is another one since some of its sandboxes were made."""

    outdated: frozenset[str] = frozenset()

    async def list(self) -> list[Sandbox]:
        return [replace(each, outdated=each.uid in self.outdated) for each in await super().list()]


async def test_a_warm_sandbox_of_an_older_image_is_replaced(tmp_path: Path, empty_house: House, python: Path) -> None:
    """After a deployment no session is given what was made before it."""
    limits = Limits(pool_size=1)
    runtime = Redeployed(tmp_path / "state" / "sandboxes", limits=limits, python=python)
    context = replace(empty_house.fellow(), sandboxes=runtime, limits=limits)
    house = House(context, empty_house.clock, empty_house.hired)
    await house.tick()
    (old,) = await runtime.list()
    runtime.outdated = frozenset({old.uid})
    session = await house.record()
    await house.handle(SessionRequested(user_id="alice"), session)
    assert (await house.session(session)).pod_uid != old.uid
    await house.tick()
    assert old.uid not in {sandbox.uid for sandbox in await runtime.list()}


async def test_the_pool_waits_for_those_who_wait(tmp_path: Path, python: Path) -> None:
    """What a warm sandbox would take is not taken from the head of the queue."""
    async with house(tmp_path / "state", python, pool_size=1, capacity=0) as full:
        session = await full.record()
        await full.handle(SessionRequested(user_id="alice"), session)
        await full.tick()
        assert await full.context.sandboxes.list() == []
        await full.handle(SessionClosed(reason=CloseReason.USER), session)
        await full.tick()
        assert [sandbox.session for sandbox in await full.context.sandboxes.list()] == [None]


async def test_a_command_cancelled_in_the_queue_never_runs(tmp_path: Path, python: Path) -> None:
    """However long the session waits for its sandbox; the commands around it run, in their order."""
    async with house(tmp_path / "state", python, capacity=1) as full:
        await full.hire()
        first, queued = await full.ready("alice"), await full.request("bob")
        await full.until_state(queued, SessionState.QUEUED)
        texts = ("echo one", "echo never", "echo two")
        one, never, two = [await full.submit(queued, text) for text in texts]
        cancel = SignalSent(signal=Signal.INT, command_id=never)
        await full.publish(cancel, queued)
        full.clock.forward(timedelta(minutes=1))
        await full.publish(SessionClosed(reason=CloseReason.USER), first)
        await full.until_state(queued, SessionState.READY)
        records = [await full.ended(queued, command) for command in (one, never, two)]
        assert [(record.state, record.reason) for record in records] == [
            (CommandState.EXITED, ""),
            (CommandState.KILLED, "cancelled"),
            (CommandState.EXITED, ""),
        ]
        assert b"never" not in await full.transcript(queued)
