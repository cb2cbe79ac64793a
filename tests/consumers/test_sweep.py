"""What the ticks put right: idle and expired sessions, orphans, starters and tenders that died, the queue, the pool."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from consumers.admission import fair_queue, spec
from schemas.documents import Session
from schemas.errors import SandboxGone
from schemas.events import CloseReason, SessionClosed, SessionRequested
from schemas.lifecycle import CommandState, SessionState
from schemas.limits import Limits
from schemas.ports import Message, Query
from schemas.topics import SESSION_EVENTS
from tests.consumers.house import House, house
from tests.waiting import until

LIMITS = Limits()
SECOND = timedelta(seconds=1)


@pytest.fixture
async def small_house(tmp_path: Path, python: Path) -> AsyncIterator[House]:
    """Room for one sandbox only."""
    async with house(tmp_path / "state", python, capacity=1) as opened:
        yield opened


@pytest.mark.slow
async def test_an_idle_session_is_warned_then_closed(tmp_path: Path, python: Path) -> None:
    """The warning is visible first, for as long as promised. In real time, since the agent's clock cannot be set."""
    times = {"idle_timeout": 3 * SECOND, "idle_warning": 2 * SECOND}
    async with house(tmp_path / "state", python, **times) as impatient:
        await impatient.hire()
        session = await impatient.ready()

        async def warned() -> Session | None:
            await impatient.tick()
            found = await impatient.session(session)
            return found if found.warning else None

        found = await until(warned, "the warning shows")
        assert found.state is SessionState.READY
        assert found.warning is not None
        assert found.warning - impatient.clock.now() > 1.5 * SECOND

        async def closed() -> bool:
            await impatient.tick()
            return (await impatient.session(session)).state is SessionState.CLOSED

        await until(closed, "the session is closed")
        assert (await impatient.session(session)).reason == "idle"
        assert impatient.clock.now() >= found.warning


async def test_a_session_that_is_used_after_the_warning_stays(staffed: House) -> None:
    """Closing for idleness is decided by what happened since, not by what the sweep saw."""
    session = await staffed.ready()
    staffed.clock.forward(LIMITS.idle_timeout - LIMITS.idle_warning + SECOND)
    await staffed.tick()
    store = staffed.context.store
    await store.update(f"sessions/{session}", {"lastActivityAt": staffed.clock.now()})
    staffed.clock.forward(LIMITS.idle_warning + SECOND)
    await staffed.handle(SessionClosed(reason=CloseReason.IDLE), session)
    assert (await staffed.session(session)).state is SessionState.READY


async def test_a_session_ends_at_its_longest_life(staffed: House) -> None:
    """However busy it is."""
    session = await staffed.ready()
    staffed.clock.forward(LIMITS.session_lifetime + SECOND)
    await staffed.tick()
    closed = await staffed.until_state(session, SessionState.CLOSED)
    assert closed.reason in ("expired", "idle")


async def test_a_request_that_was_never_published_is_published(staffed: House) -> None:
    """The function recorded the session and died: the session starts all the same."""
    session = await staffed.record()
    staffed.clock.forward(LIMITS.request_timeout + SECOND)
    await staffed.tick()
    await staffed.until_state(session, SessionState.READY)


async def test_a_starter_that_died_is_replaced(staffed: House) -> None:
    """The step to starting was written, the sandbox was not: the next tick goes on from there."""
    session = await staffed.record(state=SessionState.STARTING)
    staffed.clock.forward(LIMITS.request_timeout + SECOND)
    await staffed.tick()
    await staffed.until_state(session, SessionState.READY)


async def test_a_sandbox_that_never_becomes_ready_fails_its_session(empty_house: House) -> None:
    """Nobody waits for ever, and the sandbox is not left behind."""
    session = await empty_house.record()
    await empty_house.handle(SessionRequested(user_id="alice"), session)
    empty_house.clock.forward(LIMITS.start_timeout + SECOND)
    await empty_house.tick()
    failed = await empty_house.session(session)
    assert failed.state is SessionState.FAILED
    assert "was not ready" in failed.reason
    assert await empty_house.context.sandboxes.list() == []
    assert await empty_house.live_sessions() == 0


async def test_an_orphan_is_deleted_after_its_grace(empty_house: House) -> None:
    """A sandbox without a live session does not live on; a young one may still be getting its session."""
    sandboxes = empty_house.context.sandboxes
    await sandboxes.create(spec(empty_house.context, "s" + "b" * 25, None))
    await empty_house.tick()
    assert len(await sandboxes.list()) == 1
    empty_house.clock.forward(LIMITS.orphan_grace + SECOND)
    await empty_house.tick()
    assert await sandboxes.list() == []


async def test_the_sandbox_of_a_session_that_cannot_be_read_is_left_alone(empty_house: House) -> None:
    """Nobody knows whether it lives: the orphans beside it are deleted all the same, and the tick is done."""
    sandboxes = empty_house.context.sandboxes
    broken = await empty_house.record()
    await empty_house.context.store.update(f"sessions/{broken}", {"rows": "many"})
    for session in (broken, "s" + "b" * 25):
        await sandboxes.create(spec(empty_house.context, session, None))
    empty_house.clock.forward(LIMITS.orphan_grace + SECOND)
    await empty_house.tick()
    assert [sandbox.session for sandbox in await sandboxes.list()] == [broken]


async def test_a_session_whose_sandbox_was_killed_is_lost_and_says_so(staffed: House) -> None:
    """The end is not invented: lost, with the reason, a mark in the transcript, and the running command lost too."""
    session = await staffed.ready()
    command = await staffed.submit(session, "echo before; sleep 600")
    await until(lambda: _holds(staffed, session, b"before"), "the command runs")
    found = await staffed.session(session)
    await staffed.context.sandboxes.delete(found.pod_name, found.pod_uid)
    lost = await staffed.until_state(session, SessionState.LOST)
    assert lost.reason
    last = (await staffed.chunks(session))[-1]
    assert (last.kind, last.length) == ("gap", None)
    assert lost.final_offset == last.offset
    assert (await staffed.ended(session, command)).state is CommandState.LOST
    assert await staffed.live_sessions() == 0


async def _holds(house: House, session: str, text: bytes) -> bool:
    return text in await house.transcript(session)


async def test_a_lost_session_makes_room_for_the_next(small_house: House) -> None:
    """A sandbox killed from outside frees its place, and the queue moves on by itself."""
    await small_house.hire()
    first, second = await small_house.ready("alice"), await small_house.request("bob")
    await small_house.until_state(second, SessionState.QUEUED)
    found = await small_house.session(first)
    await small_house.context.sandboxes.delete(found.pod_name, found.pod_uid)
    await small_house.until_state(second, SessionState.READY)


async def test_a_full_cluster_is_a_queue_with_positions(small_house: House) -> None:
    """Nobody is refused: who waits sees the place, and moves up when somebody leaves."""
    await small_house.hire()
    first = await small_house.ready("alice")
    second, third = await small_house.request("bob"), await small_house.request("carol")
    for name in (second, third):
        await small_house.until_state(name, SessionState.QUEUED)

    async def placed() -> bool:  # who is being tried at a tick is out of the queue for a moment
        await small_house.tick()
        return [(await small_house.session(name)).position for name in (second, third)] == [1, 2]

    await until(placed, "both see their places")
    await small_house.publish(SessionClosed(reason=CloseReason.USER), first)
    await small_house.until_state(second, SessionState.READY)

    async def moved_up() -> bool:
        await small_house.tick()
        return (await small_house.session(third)).position == 1

    await until(moved_up, "the third is the first to wait")


async def test_the_queue_is_fair_by_user(small_house: House) -> None:
    """Who has sandboxes, or many sessions waiting, lets others go first."""
    await small_house.hire()
    await small_house.ready("alice")
    greedy = [await small_house.request("alice") for _ in range(3)]
    modest = await small_house.request("bob")

    async def fair() -> bool:  # whoever is being tried is out of the queue for a moment
        order = [candidate.id for candidate in await fair_queue(small_house.context)]
        return order == [modest, *greedy]

    await until(fair, "all of them wait, the modest one first")


async def test_a_session_that_leaves_the_queue_costs_nothing(small_house: House) -> None:
    """Closing while queued ends at once, without a sandbox ever."""
    await small_house.hire()
    await small_house.ready("alice")
    waiting = await small_house.request("bob")
    await small_house.until_state(waiting, SessionState.QUEUED)
    await small_house.publish(SessionClosed(reason=CloseReason.USER), waiting)
    closed = await small_house.until_state(waiting, SessionState.CLOSED)
    assert (closed.pod_uid, closed.final_offset) == ("", 0)


async def test_a_warm_sandbox_is_claimed_and_replaced(tmp_path: Path, python: Path) -> None:
    """A session from the pool gets the sandbox that was waiting, and the pool fills again."""
    async with house(tmp_path / "state", python, pool_size=1) as pooled:
        await pooled.tick()
        (warm,) = await pooled.context.sandboxes.list()
        await pooled.context.sandboxes.running(warm.name, warm.uid)
        await pooled.hire()
        session = await pooled.ready()
        assert (await pooled.session(session)).pod_uid == warm.uid
        await pooled.tick()
        assert len(await pooled.context.sandboxes.list()) == 2


async def test_closing_that_takes_too_long_is_forced_with_a_gap(empty_house: House) -> None:
    """Without a tender the sweep ends it: the transcript says that something may be missing."""
    async with empty_house.hired:
        await empty_house.hire()
        session = await empty_house.ready()
    await empty_house.context.store.update(f"sessions/{session}", {"state": "closing", "reason": "user"})
    empty_house.clock.forward(LIMITS.closing_grace + LIMITS.idle_timeout)
    await empty_house.tick()
    closed = await empty_house.session(session)
    assert closed.state is SessionState.CLOSED
    last = (await empty_house.chunks(session))[-1]
    assert (last.kind, last.reason) == ("gap", "Closing took too long.")
    assert await empty_house.context.sandboxes.list() == []


async def test_a_message_that_is_no_event_is_kept_and_disturbs_nobody(staffed: House) -> None:
    """Unknown or malformed: to the dead letters with its bytes, once; the session's next event is handled."""
    session = await staffed.ready()
    await staffed.context.bus.publish(SESSION_EVENTS, Message(b"\xffnonsense", {"ce-type": "no.such.v9"}, session))
    assert (await staffed.run(session, "echo on"))[1] == b"on\r\n"

    async def buried() -> bool:
        dead = await staffed.context.store.query(Query("deadLetters"))
        return [snapshot.data["data"] for snapshot in dead] == [b"\xffnonsense"]

    await until(buried, "the message is in the dead letters")


async def test_nothing_is_left_of_a_closed_session(staffed: House) -> None:
    """No sandbox, no deadline, no tender, no place taken."""
    session = await staffed.ready()
    found = await staffed.session(session)
    await staffed.publish(SessionClosed(reason=CloseReason.USER), session)
    closed = await staffed.until_state(session, SessionState.CLOSED)
    assert (closed.tended_at, closed.live) == (None, False)

    async def forgotten() -> bool:
        return (await staffed.session(session)).deadline is None

    await until(forgotten, "its end is said")
    with pytest.raises(SandboxGone):
        await staffed.context.sandboxes.connect(found.pod_name, found.pod_uid)
