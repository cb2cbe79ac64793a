"""Sessions end at awkward moments: every command has an end, and nothing waits for a forced close."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from consumers import chunks
from consumers.close_session import close_session
from consumers.commands import record
from consumers.sessions import load
from consumers.settlement import DONE
from consumers.sweep import sweep
from consumers.tend_session import finish, tend_session
from infra.local.sandboxes import LocalSandboxes
from infra.local.store import LocalStore
from schemas.errors import SandboxFailed
from schemas.events import CloseReason, CommandSubmitted, SessionClosed, SessionOpened, SessionRequested
from schemas.lifecycle import UNSETTLED, CommandState, SessionState
from schemas.limits import Limits
from schemas.ports import ByteStream, Query, Sandbox, SandboxSpec, Snapshot
from tests.consumers.house import House
from tests.contracts.waiting import soon

LIMITS = Limits()


class NoIsolation(LocalSandboxes):
    """A machine on which no sandbox can be started."""

    async def create(self, spec: SandboxSpec) -> Sandbox:
        raise SandboxFailed(f"{spec.name} cannot be isolated here")


async def test_commands_of_a_session_that_fails_to_start_have_an_end(
    tmp_path: Path, empty_house: House, python: Path
) -> None:
    """Submitted before the sandbox was to be made: their sender does not wait for ever."""
    broken = NoIsolation(tmp_path / "state" / "sandboxes", limits=LIMITS, python=python)
    house = House(replace(empty_house.context, sandboxes=broken), empty_house.clock, empty_house.hired)
    session = await house.record()
    await house.handle(CommandSubmitted(command_id="early", text="echo early"), session)
    await house.handle(SessionRequested(user_id="alice"), session)
    assert (await house.session(session)).state is SessionState.FAILED
    early = await house.command(session, "early")
    assert early is not None
    assert (early.state, early.reason) == (CommandState.KILLED, "session_closed")


class Rival(LocalStore):
    """Records a command in the moment after all commands were settled, as another worker may."""

    house: House
    session: str
    looks = 0

    async def query(self, query: Query) -> list[Snapshot]:
        found = await super().query(query)
        self.looks += query.collection.endswith("/commands")
        if self.looks == len(UNSETTLED):
            event = CommandSubmitted(command_id="c1", text="x")
            await record(self.house.context, self.session, event, self.house.clock.now())
        return found


async def test_a_command_recorded_while_its_session_ends_has_an_end(empty_house: House) -> None:
    """It comes after all others were settled and before the end: it is settled with them."""
    async with empty_house.hired:
        await empty_house.hire()
        session = await empty_house.ready()
    own: Any = empty_house.context.store
    store = Rival(own._database, indexes=own._indexes)
    store.house, store.session = empty_house, session
    current = await load(empty_house.context, session)
    assert current is not None
    await finish(replace(empty_house.context, store=store), current, SessionState.LOST, "Gone.", 0)
    command = await empty_house.command(session, "c1")
    assert command is not None
    assert (command.state, command.reason) == (CommandState.LOST, "Gone.")


@pytest.fixture
async def deserted(empty_house: House) -> tuple[House, str]:
    """A ready session whose tender is gone."""
    async with empty_house.hired:
        await empty_house.hire()
        session = await empty_house.ready()
    return empty_house, session


async def _tended_again(house: House, session: str) -> None:
    await house.hire()
    await house.publish(SessionOpened(epoch=(await house.session(session)).epoch), session)


async def test_a_close_whose_worker_died_half_way_stops_the_shell(deserted: tuple[House, str]) -> None:
    """Its redelivery finds the session closing, and still asks the shell to stop."""
    house, session = deserted
    await house.context.store.update(f"sessions/{session}", {"state": "closing", "reason": "user"})
    await house.handle(SessionClosed(reason=CloseReason.USER), session)
    control = await house.context.controls.get(session, await house.session(session))
    assert (await control.request("status"))["state"] in ("stopping", "ended")


async def test_a_tender_that_takes_over_a_closing_session_ends_it_in_good_order(deserted: tuple[House, str]) -> None:
    """Nobody could reach the agent when the session was closed: no forced end, no gap."""
    house, session = deserted
    await house.context.store.update(f"sessions/{session}", {"state": "closing", "reason": "user"})
    await _tended_again(house, session)
    closed = await house.until_state(session, SessionState.CLOSED)
    chunks_there = await house.chunks(session)
    assert {chunk.kind for chunk in chunks_there} == {"data"}
    assert closed.final_offset == chunks_there[-1].end


class WorkerDied(Exception):
    """kill -9, as far as this process goes."""


class LastDeed(LocalSandboxes):
    """Waits until a sandbox has ended by itself instead of removing it; there its worker dies."""

    async def delete(self, name: str, uid: str) -> None:
        await soon(self.gone(name, uid))
        raise WorkerDied


async def test_an_agent_leaves_once_its_sessions_end_is_recorded(
    tmp_path: Path, deserted: tuple[House, str], python: Path
) -> None:
    """Before anybody removes its sandbox; a worker that dies then leaves an end that the next one need only finish."""
    house, session = deserted
    control = await house.context.controls.get(session, await house.session(session))
    await control.input("i1", b"echo last; exit 7\r")
    rival = LastDeed(tmp_path / "state" / "sandboxes", limits=LIMITS, python=python)
    event = SessionOpened(epoch=(await house.session(session)).epoch)
    tending = tend_session(
        replace(house.fellow(), sandboxes=rival), session, event, message_id="m", attempt=1, stopping=asyncio.Event()
    )
    with pytest.raises(WorkerDied):
        await soon(tending)
    assert (await house.session(session)).state is SessionState.CLOSING
    await _tended_again(house, session)
    closed = await house.until_state(session, SessionState.CLOSED)
    assert closed.reason == "The shell exited with code 7."
    assert {chunk.kind for chunk in await house.chunks(session)} == {"data"}
    transcript = await house.transcript(session)
    assert transcript.endswith(b"last\r\nexit\r\n")
    assert closed.final_offset == len(transcript)


class ClosedMeanwhile(LocalSandboxes):
    """Closes the session in the moment before its tender connects."""

    house: House
    session = ""

    async def connect(self, name: str, uid: str) -> ByteStream:
        if self.session:
            session, self.session = self.session, ""
            await close_session(self.house.context, session, CloseReason.USER)
        return await super().connect(name, uid)


async def test_a_session_closed_as_it_becomes_ready_is_closed_at_once(
    tmp_path: Path, empty_house: House, python: Path
) -> None:
    """No shell runs on behind a session that is closing, and nothing stands behind its final offset."""
    session = await empty_house.record()
    await empty_house.handle(SessionRequested(user_id="alice"), session)
    rival = ClosedMeanwhile(tmp_path / "state" / "sandboxes", limits=LIMITS, python=python)
    rival.house, rival.session = empty_house, session
    verdict = await tend_session(
        replace(empty_house.fellow(), sandboxes=rival),
        session,
        SessionOpened(),
        message_id="m",
        attempt=1,
        stopping=asyncio.Event(),
    )
    assert verdict == DONE
    closed = await empty_house.session(session)
    assert (closed.state, closed.reason, closed.final_offset) == (SessionState.CLOSED, "user", 0)
    assert await empty_house.chunks(session) == []
    assert await empty_house.context.sandboxes.list() == []


class LateSweep(LocalStore):
    """The sweep comes to the sessions that it found only when others have seen to them."""

    found: list[Snapshot]

    async def query(self, query: Query) -> list[Snapshot]:
        return self.found if query.order_by == "deadline" else await super().query(query)


async def test_a_session_that_ended_in_good_order_is_not_forced_afterwards(deserted: tuple[House, str]) -> None:
    """A tick may be held up for minutes by a node that is gone: what is complete by then gets no gap."""
    house, session = deserted
    await house.context.store.update(f"sessions/{session}", {"state": "closing", "reason": "user"})
    closing = await house.context.store.get(f"sessions/{session}")
    assert closing is not None
    await _tended_again(house, session)
    await house.until_state(session, SessionState.CLOSED)
    own: Any = house.context.store
    store = LateSweep(own._database, indexes=own._indexes)
    store.found = [closing]
    await sweep(replace(house.context, store=store))
    assert {chunk.kind for chunk in await house.chunks(session)} == {"data"}


async def test_a_session_whose_transcript_was_sealed_and_no_more_is_lost(deserted: tuple[House, str]) -> None:
    """The worker that gave it up died in between: the next one ends it, instead of leaving it alone for ever."""
    house, session = deserted
    await chunks.seal(house.context, f"sessions/{session}", "Gone.", house.clock.now())
    await _tended_again(house, session)
    lost = await house.until_state(session, SessionState.LOST)
    assert lost.reason == "Gone."
    assert await house.context.sandboxes.list() == []


async def test_a_session_used_in_the_last_moment_is_not_closed_as_idle(deserted: tuple[House, str]) -> None:
    """The close asks the agent itself: its tender may not have heard, or signed, that somebody types."""
    house, session = deserted
    before = await house.session(session)
    house.clock.forward(2 * LIMITS.idle_timeout)
    await house.context.store.update(f"sessions/{session}", {"warning": house.clock.now()})
    await house.handle(SessionClosed(reason=CloseReason.IDLE), session)
    after = await house.session(session)
    assert (after.state, after.warning) == (SessionState.READY, None)
    assert after.last_activity_at > before.last_activity_at
