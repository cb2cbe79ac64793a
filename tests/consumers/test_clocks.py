"""Workers whose machines' clocks are minutes apart: the time they share is the store's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest

from infra.clock import ServiceClock
from infra.local.store import LocalStore
from schemas.ports import Fields, Transaction
from tests.consumers.clocks import AHEAD, PATIENT, SECOND, ClocksApart, ClocksApartIdle, Offices, WrongClock
from tests.consumers.house import House, house

T = TypeVar("T")


class Machine:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.time = datetime(2026, 3, 1, 12, tzinfo=UTC)

    def now(self) -> datetime:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds * SECOND


def test_a_clock_that_is_right_stays_as_it_is() -> None:
    """To within a round trip nobody can know better."""
    machine = Machine()
    clock = ServiceClock(machine)
    asked = clock.asked()
    machine.time += SECOND
    clock.told(machine.time - 0.3 * SECOND, asked)
    assert clock.now() == machine.time


@pytest.mark.parametrize("off", [-AHEAD, AHEAD, timedelta(days=-400)], ids=str)
def test_a_wrong_clock_is_set_right_by_one_answer(off: timedelta) -> None:
    """To within the round trip, in either direction, and again when somebody sets the machine's clock meanwhile."""
    machine = Machine()
    clock = ServiceClock(machine)
    for _ in range(2):
        asked = clock.asked()
        done = machine.time + off + 0.1 * SECOND
        machine.time += 0.3 * SECOND
        clock.told(done, asked)
        assert abs(clock.now() - (machine.time + off)) <= 0.3 * SECOND
        off -= timedelta(hours=1)


def test_many_answers_narrow_the_error() -> None:
    """The quickest of them counts; a slow one takes nothing back."""
    machine = Machine()
    clock = ServiceClock(machine)
    for there, back in ((2.0, 0.0), (0.01, 0.01), (0.0, 3.0), (5.0, 5.0)):
        asked = clock.asked()
        machine.time += there * SECOND
        done = machine.time + AHEAD
        machine.time += back * SECOND
        clock.told(done, asked)
    assert abs(clock.now() - (machine.time + AHEAD)) <= 0.02 * SECOND


def test_an_answer_across_a_jump_of_the_clock_says_nothing() -> None:
    """A clock that was set back while somebody waited makes the answer come before the question."""
    machine = Machine()
    clock = ServiceClock(machine)
    asked = clock.asked()
    machine.time -= timedelta(hours=1)
    clock.told(machine.time + timedelta(hours=1), asked)
    assert clock.now() == machine.time


class TellingStore(LocalStore):
    """Says with each commit what time it is, as Firestore does."""

    clock: ServiceClock

    async def create(self, path: str, data: Fields) -> str:
        return await self._telling(super().create(path, data))

    async def update(self, path: str, fields: Fields, *, expect: str | None = None) -> str:
        return await self._telling(super().update(path, fields, expect=expect))

    async def delete(self, path: str) -> None:
        return await self._telling(super().delete(path))

    async def transact(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        return await self._telling(super().transact(work))

    async def _telling(self, call: Awaitable[T]) -> T:
        asked = self.clock.asked()
        result = await call
        self.clock.told(datetime.now(UTC), asked)
        return result


async def office(shared: House, ahead: timedelta) -> House:
    """A house on the same backends, on a machine whose clock is off."""
    own: Any = shared.context.store
    clock = ServiceClock(WrongClock(ahead))
    store = TellingStore(own._database, indexes=own._indexes)
    store.clock = clock
    await store.delete("clocks/none")
    return House(replace(shared.fellow(), store=store, clock=clock), shared.clock, shared.hired)


@pytest.fixture
async def offices(tmp_path: Path, python: Path) -> AsyncIterator[Offices]:
    """Times are short by no clock but one that is minutes off."""
    async with house(tmp_path / "state", python, **PATIENT) as shared:
        yield Offices(await office(shared, AHEAD), await office(shared, -AHEAD))


@pytest.fixture
async def impatient(tmp_path: Path, python: Path) -> AsyncIterator[Offices]:
    """Closed after seconds."""
    async with house(tmp_path / "state", python, idle_timeout=4 * SECOND, idle_warning=2 * SECOND) as shared:
        yield Offices(await office(shared, AHEAD), await office(shared, -AHEAD))


@pytest.mark.slow
class TestOnTheEmbeddedStack(ClocksApart, ClocksApartIdle):
    """One machine has one clock; two that share a store would have two."""
