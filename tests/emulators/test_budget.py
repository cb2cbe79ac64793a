"""What a command costs on Firestore and Pub/Sub, counted where the calls leave for the emulators: this is the bill."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bench.counted import Place, Session, deployment
from schemas.documents import Command
from tests.pace import in_a_breath
from tests.waiting import until

pytestmark = pytest.mark.slow

WRITES, MESSAGES = 6, 4  # for a short command, everything counted
READS = 8  # likewise, with one reader; a write costs three times as much
SHORT_SECONDS = 0.02

WRITES_PER_MB = 5  # a full chunk is 256 KiB, so 3.8 of them are a megabyte; the rest is the command's own
FLOOD = "seq 1 1000000"
FLOOD_BYTES = 7_888_896
FAST = 4e6  # bytes/s; a program that prints less in a second is written four times a second, whatever that comes to


@pytest.fixture
async def session(
    tmp_path: Path, python: Path, pubsub_host: str, firestore_host: str, project: str
) -> AsyncIterator[Session]:
    """A session with one reader, in a deployment whose calls are counted."""
    async with (
        deployment(Place(tmp_path, python, pubsub_host, firestore_host, project)) as opened,
        opened.session() as session,
    ):
        yield session


async def test_a_short_command_costs_six_writes_and_four_messages_at_most(session: Session) -> None:
    """Its record and number, its output, its end; and no write is there only to carry a precondition."""
    tally = session.deployment.tally
    for text in ("true", "echo hello", "ls -la /; false"):

        async def was_short(text: str = text) -> bool:
            """Nor did the worker take so long that it was shown as running, which costs a write more."""
            seconds = (await _counted(session, text)).seconds or 0.0
            at_once = await in_a_breath(session.deployment.unseen, session.id, tally.writes["chunks"])
            return seconds < SHORT_SECONDS and tally.writes["commands"] == 2 and at_once

        await until(was_short, f"{text!r} takes no longer than it should")
        assert tally.writes.total() <= WRITES, tally
        assert tally.messages.total() <= MESSAGES, tally
        assert tally.reads.total() <= READS, tally
        assert not tally.writes["checks"]
        assert not tally.refused, tally


async def test_much_output_costs_five_writes_a_megabyte_at_most(session: Session) -> None:
    """It is written in full chunks, each read once by each reader, and Pub/Sub carries none of it."""
    tally = session.deployment.tally

    async def was_fast() -> bool:
        record = await _counted(session, FLOOD)
        assert record.seconds is not None
        return FLOOD_BYTES / record.seconds > FAST

    await until(was_fast, "the machine has time for a flood", patience=90)
    assert tally.writes.total() <= WRITES_PER_MB * FLOOD_BYTES / 1e6, tally
    assert tally.messages.total() <= MESSAGES, tally
    assert tally.reads["Listen"] + tally.reads["RunQuery"] <= tally.writes.total() + READS, tally


async def _counted(session: Session, text: str) -> Command:
    """Run it, with everything counted from its request to the next prompt."""
    session.deployment.tally.clear()
    return await session.run(text)
