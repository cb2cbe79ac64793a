"""session.started and session.ended: what subscribers of the lifecycle hear, whatever happens to the worker."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from schemas.errors import BusUnavailable
from schemas.events import CloseReason, SessionClosed, SessionOpened
from schemas.lifecycle import SessionState
from schemas.ports import Bus, Message
from schemas.topics import SESSION_LIFECYCLE
from tests.consumers.house import House, working
from tests.waiting import until


class Heard:
    """A bus whose lifecycle topic a test listens to and can take away."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.pull = bus.pull
        self.away = False
        self.events: list[str] = []

    async def publish(self, topic: str, message: Message) -> str:
        if topic == SESSION_LIFECYCLE:
            if self.away:
                raise BusUnavailable("no route to the bus")
            self.events.append(message.attributes["ce-id"])
        return await self._bus.publish(topic, message)


@pytest.fixture
def heard(empty_house: House) -> tuple[House, Heard]:
    """A house whose lifecycle events are heard."""
    bus = Heard(empty_house.context.bus)
    return House(replace(empty_house.context, bus=bus), empty_house.clock, empty_house.hired), bus


async def test_a_session_is_told_of_at_its_start_and_at_its_end(heard: tuple[House, Heard]) -> None:
    """Once each, with ids that a subscriber can tell doubles by."""
    house, bus = heard
    async with working(house.context):
        session = await house.ready()
        await house.publish(SessionClosed(reason=CloseReason.USER), session)
        await house.until_state(session, SessionState.CLOSED)
        await until(lambda: _says(house, session), "that it has ended is said")
    assert bus.events == [f"{session}-started", f"{session}-ended"]


async def _says(house: House, session: str) -> bool:
    return (await house.session(session)).deadline is None


async def test_an_end_that_could_not_be_told_is_told_by_the_sweep(heard: tuple[House, Heard]) -> None:
    """The bus was away, or the worker died between the end and the event: subscribers hear of it, and once."""
    house, bus = heard
    async with working(house.context):
        session = await house.ready()
        bus.away = True
        await house.publish(SessionClosed(reason=CloseReason.USER), session)
        await house.until_state(session, SessionState.CLOSED)
    bus.away = False
    await house.tick()
    assert bus.events == [f"{session}-started"]  # whoever ended it may still be about to say so
    house.clock.forward(house.context.limits.request_timeout + timedelta(seconds=1))
    await house.tick()
    await house.tick()
    assert bus.events == [f"{session}-started", f"{session}-ended"]


async def test_a_start_that_could_not_be_told_is_told_by_the_next_tender(heard: tuple[House, Heard]) -> None:
    """A worker that dies as its session becomes ready takes no news with it."""
    house, bus = heard
    bus.away = True
    async with working(house.context):
        session = await house.ready()
    bus.away = False
    async with working(house.context):
        await house.publish(SessionOpened(epoch=(await house.session(session)).epoch), session)
        await until(lambda: asyncio.sleep(0, f"{session}-started" in bus.events), "its start is said")
