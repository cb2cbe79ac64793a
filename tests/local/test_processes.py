"""Several processes on one file, some of them killed in the middle of their work."""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from infra.local.database import Database
from infra.local.store import LocalStore
from schemas.ports import Message, Query
from tests.contracts.waiting import listening, soon
from tests.local.child import CHUNKS, ORDERED, chunk_bytes, open_bus, open_store
from tests.waiting import until

ROOT = Path(__file__).parents[2]
Spawn = Callable[..., Coroutine[Any, Any, Process]]


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    """The file, open in this process too."""
    async with Database(tmp_path / "pigeon.db") as database:
        yield database


@pytest.fixture
async def spawn(tmp_path: Path) -> AsyncIterator[Spawn]:
    """Starts children on the same file; none outlives the test."""
    children: list[Process] = []

    async def start(verb: str, *arguments: object) -> Process:
        program = (sys.executable, "-m", "tests.local.child", verb, str(tmp_path / "pigeon.db"))
        child = await asyncio.create_subprocess_exec(*program, *map(str, arguments), stdin=PIPE, stdout=PIPE, cwd=ROOT)
        children.append(child)
        return child

    yield start
    for child in children:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def ended_well(child: Process) -> None:
    """Wait for a child that should come to its end."""
    assert await soon(child.wait(), 60) == 0


async def count(store: LocalStore, collection: str) -> int:
    """How many documents are in it."""
    return len(await store.query(Query(collection, limit=100_000)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
async def test_the_transcript_is_exact_whoever_is_killed(database: Database, spawn: Spawn, seed: int) -> None:
    """Two writers of one transcript, killed again and again: no gap, no double, no torn chunk."""
    chance = random.Random(seed)
    store = open_store(database)
    end = 1_500_000
    writers = [await spawn("append_chunks", end) for _ in range(2)]
    for _ in range(6):
        goal = await count(store, CHUNKS) + chance.randrange(1, 60)

        async def reached(goal: int = goal) -> bool:
            return await count(store, CHUNKS) >= goal or all(writer.returncode == 0 for writer in writers)

        await until(reached, "the writers get on")
        victim = chance.randrange(2)
        if writers[victim].returncode is None:
            writers[victim].kill()
        await writers[victim].wait()
        writers[victim] = await spawn("append_chunks", end)
    for writer in writers:
        await ended_well(writer)
    position = 0
    for chunk in await store.query(Query(CHUNKS, limit=100_000)):
        assert chunk.data == {"offset": position, "data": chunk_bytes(position)}
        position += len(chunk.data["data"])
    assert position >= end


@pytest.mark.slow
async def test_a_counter_is_exact_between_processes(database: Database, spawn: Spawn) -> None:
    """Racing transactions lose no increment."""
    store = open_store(database)
    await store.create("counters/c", {"count": 0})
    for child in [await spawn("count_up", 200) for _ in range(2)]:
        await ended_well(child)
    snapshot = await store.get("counters/c")
    assert snapshot is not None
    assert snapshot.data == {"count": 400}
    assert await count(store, "receipts") == 400


@pytest.mark.slow
async def test_a_killed_transaction_is_all_or_nothing(database: Database, spawn: Spawn) -> None:
    """The counter and the receipts of its increments agree, wherever the process died."""
    store = open_store(database)
    await store.create("counters/c", {"count": 0})
    for round_ in range(1, 6):
        child = await spawn("count_up", 1_000_000)

        async def further(goal: int = round_ * 7) -> bool:
            return await count(store, "receipts") >= goal

        await until(further, "it has counted some")
        child.kill()
        await child.wait()
        snapshot = await store.get("counters/c")
        assert snapshot is not None
        assert snapshot.data["count"] == await count(store, "receipts")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_order_holds_whoever_is_killed(database: Database, spawn: Spawn, seed: int) -> None:
    """Workers die at random moments; every message is handled, and every key's in their order."""
    chance = random.Random(seed)
    store = open_store(database)
    keys, messages = [f"k{number}" for number in range(5)], 40
    publishers = [await spawn("publish_events", key, messages) for key in keys]
    workers = [await spawn("handle_events") for _ in range(2)]

    async def handled() -> int:
        return sum(snapshot.data["last"] for snapshot in await store.query(Query("keys")))

    for _ in range(5):
        goal = await handled() + chance.randrange(1, 30)

        async def reached(goal: int = goal) -> bool:
            return await handled() >= min(goal, len(keys) * messages)

        await until(reached, "the workers get on")
        victim = chance.randrange(2)
        workers[victim].kill()
        await workers[victim].wait()
        workers[victim] = await spawn("handle_events")

    async def finished() -> bool:
        return await handled() == len(keys) * messages

    await until(finished, "everything is handled")
    for publisher in publishers:
        await ended_well(publisher)
    assert await store.query(Query("violations")) == []


async def test_a_killed_holders_message_comes_again(database: Database, spawn: Spawn) -> None:
    """Another process is given it at the deadline, without anybody ringing, and the key goes on."""
    bus = open_bus(database)
    for number in (1, 2):
        await bus.publish("events", Message(str(number).encode(), {}, "k"))
    holder = await spawn("hold_one")
    assert holder.stdout is not None
    assert await soon(holder.stdout.readline()) == b"holding 1\n"
    async with bus.pull(ORDERED) as deliveries:
        waiting = asyncio.ensure_future(soon(anext(deliveries)))
        await asyncio.sleep(0)
        holder.kill()
        killed = time.monotonic()
        again = await waiting
        assert (again.message.data, again.attempt) == (b"1", 2)
        assert time.monotonic() - killed < 5
        await again.ack()
        following = await soon(anext(deliveries))
        assert (following.message.data, following.attempt) == (b"2", 1)
        await following.ack()


async def test_listeners_hear_other_processes_at_once(database: Database, spawn: Spawn) -> None:
    """From the commit in one process to the page in another: well under the tenth of a second a person would notice."""
    child = await spawn("echo")
    assert child.stdin is not None
    assert child.stdout is not None
    await soon(child.stdout.readline())
    delays = []
    async with listening(open_store(database).follow(CHUNKS)) as pages:
        for number in range(21):
            waiting = asyncio.ensure_future(soon(anext(pages)))
            await asyncio.sleep(0)
            child.stdin.write(f"{number:04}\n".encode())
            (snapshot,) = await waiting
            delays.append(time.monotonic() - snapshot.data["at"])
    assert statistics.median(delays) < 0.1
