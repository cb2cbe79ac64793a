"""What must hold for two workers whose machines' clocks are ten minutes apart, whatever they are connected to.

A test module inherits the class and gives the fixtures `times`, a house's limits in which ten minutes matter, and
`offices`, two houses on the same backends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pytest

from infra.clock import SystemClock
from schemas.documents import Session
from schemas.events import SessionOpened
from schemas.lifecycle import SessionState
from tests.consumers.house import House, working
from tests.waiting import until

AHEAD = timedelta(minutes=5)
SECOND = timedelta(seconds=1)
PATIENT = {
    "tended_every": 0.2 * SECOND,
    "tended_stale": 20 * SECOND,
    "session_lifetime": 4 * 60 * SECOND,  # over at once by a clock that is five minutes ahead
    "idle_timeout": 3 * 60 * SECOND,
    "idle_warning": 60 * SECOND,
    "start_timeout": 60 * SECOND,
}
SIGNATURES = 5  # of the tender, between which every worker sweeps


class WrongClock(SystemClock):
    """A machine's clock that is off by so much."""

    def __init__(self, ahead: timedelta) -> None:
        self.ahead = ahead

    def now(self) -> datetime:
        return super().now() + self.ahead


class Offices(NamedTuple):
    """Two houses on the same backends: the clock of one machine is ahead, that of the other behind."""

    fast: House
    slow: House


@asynccontextmanager
async def staffed(*houses: House) -> AsyncIterator[None]:
    """One worker in each, with connections of its own; cut off on the way out."""
    workers = [working(house.fellow()) for house in houses]
    async with workers[0]:
        if len(workers) == 1:
            yield
        else:
            async with staffed(*houses[1:]):
                yield


async def stays_as_it_is(offices: Offices, session: str, epoch: int) -> Session:
    """Both sweep between the signatures of its tender, and nothing comes of it."""
    found = await offices.fast.session(session)
    for _ in range(SIGNATURES):
        signed = found.tended_at

        async def signed_again(before: datetime | None = signed) -> Session | None:
            now = await offices.slow.session(session)
            return now if now.tended_at != before else None

        for house in offices:
            await house.tick()
        found = await until(signed_again, "the tender signs")
        assert (found.state, found.epoch, found.warning) == (SessionState.READY, epoch, None)
    return found


def is_about(moment: datetime | None, expected: datetime) -> bool:
    """Less than the clocks are off, and more than a loaded machine is slow."""
    return moment is not None and abs(moment - expected) < AHEAD / 3


class ClocksApart:
    """Takeovers, deadlines and ends."""

    @pytest.mark.parametrize("first", ["fast", "slow"])
    async def test_a_session_is_tended_by_one_worker_until_it_dies(self, offices: Offices, first: str) -> None:
        """No sweep of either finds it stale, idle or expired; its tender's end is noticed, and noticed once."""
        holder, other = offices if first == "fast" else reversed(offices)
        async with staffed(holder):
            session = await holder.ready()
            found = await stays_as_it_is(offices, session, epoch=1)
            now = datetime.now(UTC)
            assert is_about(found.tended_at, now)
            assert is_about(found.ready_at, now)
            assert is_about(found.expires_at, now + PATIENT["session_lifetime"])
            assert (await holder.run(session, "echo one"))[1] == b"one\r\n"
        async with staffed(other):
            await other.publish(SessionOpened(epoch=1), session)

            async def taken_over() -> bool:
                return (await other.session(session)).epoch == 2

            await until(taken_over, "the other tends it", 60.0)
            await stays_as_it_is(offices, session, epoch=2)
            assert (await other.run(session, "echo two"))[1] == b"two\r\n"

    async def test_a_message_that_comes_twice_takes_nothing_from_a_living_tender(self, offices: Offices) -> None:
        """However its clock is set, a worker that is asked to tend a session looks first whether somebody does."""
        async with staffed(*offices):
            session = await offices.fast.ready()
            for _ in range(4):
                await offices.slow.publish(SessionOpened(epoch=0), session)
            await stays_as_it_is(offices, session, epoch=1)

    async def test_starting_takes_its_time(self, offices: Offices) -> None:
        """A sweep by the faster clock does not call a start of a moment ago a failed one."""
        async with staffed(offices.slow):
            sessions = await asyncio.gather(*(offices.slow.request(user) for user in ("alice", "bob")))
            for _ in range(SIGNATURES):
                await offices.fast.tick()
            for session in sessions:
                await offices.slow.until_state(session, SessionState.READY)
                assert (await offices.slow.session(session)).epoch == 1


class ClocksApartIdle:
    """The end of an unused session, in real time: the agent's clock cannot be set."""

    async def test_an_unused_session_is_closed_when_it_is_due(self, impatient: Offices) -> None:
        """Neither at once nor minutes late, and warned first, though both sweep."""
        timeout = impatient.fast.context.limits.idle_timeout
        async with staffed(*impatient):
            session = await impatient.fast.ready()
            ready_at = (await impatient.fast.session(session)).ready_at
            seen: list[datetime] = []

            async def closed() -> bool:
                for house in impatient:
                    await house.tick()
                found = await impatient.slow.session(session)
                if found.warning is not None:
                    seen.append(found.warning)
                return found.state is SessionState.CLOSED

            await until(closed, "the session is closed", 60.0)
            assert ready_at is not None
            assert datetime.now(UTC) >= ready_at + timeout - SECOND / 2
            assert seen
            assert (await impatient.fast.session(session)).reason == "idle"
