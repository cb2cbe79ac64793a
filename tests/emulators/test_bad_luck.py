"""A worker whose calls to Pub/Sub and Firestore fail every now and then, before or after they were done."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from infra.adapters.firestore import firestore_store
from infra.adapters.pubsub import pubsub_bus
from schemas.documents import INDEXES, Command
from schemas.events import ClockTicked
from schemas.topics import SUBSCRIPTIONS, TOPICS
from tests.consumers.house import House, house, working
from tests.emulators.faults import Faults, failure
from tests.waiting import until

Code = grpc.StatusCode
PASSING = [Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.ABORTED]
SHARE = 0.15  # of the calls fail before, and as many after they were done
COMMANDS = 30
TIMES = {"tended_every": timedelta(seconds=1), "tended_stale": timedelta(seconds=4)}
PRINTED = b"".join(b"%d\r\n" % number for number in range(1, 100_001))


class Luck(Faults):
    """Faults by chance, at every kind of call."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)
        self.failed: set[tuple[str, grpc.StatusCode]] = set()

    @property
    def after_answers(self) -> bool:
        return True

    def check_before(self, details: Any) -> None:
        self._toss(details)

    def check_after(self, details: Any) -> None:
        self._toss(details)

    def _toss(self, details: Any) -> None:
        if self._random.random() < SHARE:
            code = self._random.choice(PASSING)
            self.failed.add((str(details.method), code))
            raise failure(code)


@asynccontextmanager
async def unlucky(opened: House, project: str, pubsub: str, firestore: str, luck: Luck) -> AsyncIterator[House]:
    """The house on emulators, seen by somebody who is in luck; its one worker is not."""
    async with (
        pubsub_bus(project, pubsub) as bus,
        firestore_store(project, indexes=INDEXES, emulator=firestore) as store,
        pubsub_bus(project, pubsub, interceptors=luck.interceptors()) as bad_bus,
        firestore_store(project, indexes=INDEXES, emulator=firestore, interceptors=luck.interceptors()) as bad_store,
    ):
        await bus.create(TOPICS, SUBSCRIPTIONS)
        office = House(replace(opened.fellow(), store=store, bus=bus), opened.clock, opened.hired)
        async with working(replace(opened.fellow(), store=bad_store, bus=bad_bus)):
            ticking = asyncio.create_task(_tick(office))
            try:
                yield office
            finally:
                ticking.cancel()
                await asyncio.gather(ticking, return_exceptions=True)


async def _tick(office: House) -> None:
    """Who dies, or is told that it may have failed, between two steps relies on the next tick for the second."""
    while True:
        await office.publish(ClockTicked(at=office.clock.now()), "")
        await asyncio.sleep(1.0)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, 2])
async def test_bad_luck_costs_time_and_nothing_else(
    tmp_path: Path, python: Path, project: str, pubsub_host: str, firestore_host: str, seed: int
) -> None:
    """Three calls in ten fail, half of them with their work done: output is exact, commands run once and in order."""
    luck = Luck(seed)
    async with (
        house(tmp_path / "state", python, **TIMES) as opened,
        unlucky(opened, project, pubsub_host, firestore_host, luck) as office,
    ):
        session = await office.ready()
        commands = [await office.submit(session, f"echo {number} >> log") for number in range(COMMANDS)]
        flood = await office.submit(session, "seq 1 100000")
        record = await until(lambda: _ended(office, session, flood), "the last command has an end", 200.0)
        assert record.start_offset is not None
        assert (await office.transcript(session))[record.start_offset : record.end_offset] == PRINTED
        assert [(await office.ended(session, command)).exit_code for command in commands] == [0] * COMMANDS
        _, log = await office.run(session, "cat log")
        assert log == b"".join(b"%d\r\n" % number for number in range(COMMANDS))
    assert {code for _, code in luck.failed} == set(PASSING)


async def _ended(office: House, session: str, command: str) -> Command | None:
    record = await office.command(session, command)
    return record if record is not None and record.ended_at is not None else None
