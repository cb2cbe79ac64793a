"""What the embedded store promises beyond the contract: indexes, listeners in number, pruning, contention."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from infra.local.database import Database
from infra.local.documents import MAX_PAGE_BYTES, select_page
from infra.local.indexes import plan
from infra.local.schema import connect, prepare
from infra.local.store import LocalStore
from infra.transactions import MAX_TRIES
from schemas.documents import INDEXES
from schemas.errors import Conflict, StoreUnavailable
from schemas.ids import chunk_id
from schemas.limits import MAX_CHUNK_BYTES
from schemas.ports import Query, Snapshot, Transaction, Where
from tests.contracts.waiting import PATIENCE, listening, soon
from tests.waiting import until

NOW = datetime(2026, 3, 1, tzinfo=UTC)
CHUNKS = "sessions/s1/chunks"


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    """An open database."""
    async with Database(tmp_path / "pigeon.db") as database:
        yield database


@pytest.fixture
def store(database: Database) -> LocalStore:
    """A store with the system's indexes."""
    return LocalStore(database, indexes=INDEXES)


async def test_a_newly_declared_index_finds_old_documents(database: Database) -> None:
    """A later version of the program may ask questions that an earlier one did not know."""
    old = LocalStore(database, indexes={"sessions": (("state",),)})
    for number in range(3):
        await old.create(f"sessions/s{number}", {"deadline": 3 - number, "state": "ready"})
    new = LocalStore(database, indexes={"sessions": (("deadline",),)})
    found = await new.query(Query("sessions", order_by="deadline"))
    assert [snapshot.id for snapshot in found] == ["s2", "s1", "s0"]
    ((entries,),) = await database.read(
        lambda connection: connection.execute("SELECT count(*) FROM entries").fetchall()
    )
    assert entries == 3


@pytest.mark.parametrize(
    "query",
    [
        Query("sessions", (Where("userId", "==", "u"), Where("live", "==", True)), "createdAt", descending=True),
        Query("sessions", (Where("deadline", "<=", NOW),), "deadline"),
        Query("sessions", (Where("tendedAt", "<=", NOW), Where("tendedAt", ">=", NOW)), "tendedAt"),
        Query("sessions", after="s1"),
        Query("sessions", descending=True),
    ],
)
async def test_no_query_scans_or_sorts(database: Database, query: Query) -> None:
    """Every declared query reads its own rows only."""
    planned = plan(INDEXES, query)

    def explain(connection: sqlite3.Connection) -> str:
        rows = connection.execute("EXPLAIN QUERY PLAN " + planned.sql, planned.parameters).fetchall()
        return "\n".join(row[3] for row in rows)

    explained = await database.read(explain)
    assert "SCAN" not in explained
    assert "TEMP B-TREE" not in explained


async def test_endless_contention_is_a_conflict(store: LocalStore) -> None:
    """A transaction that always loses its race gives up after a bounded number of tries."""
    await store.create("users/u1", {"count": 0})
    tries = 0

    async def disturbed(transaction: Transaction) -> None:
        nonlocal tries
        tries += 1
        await transaction.get("users/u1")
        await store.update("users/u1", {"count": tries})
        transaction.update("users/u1", {"count": -1})

    with pytest.raises(Conflict):
        await store.transact(disturbed)
    assert tries == MAX_TRIES


async def test_work_is_not_believed_when_it_saw_what_never_was(store: LocalStore) -> None:
    """An error raised by work that read half of somebody's commit is not its last word: it runs again."""
    await store.create("users/a", {"sum": 1})
    await store.create("users/b", {"sum": 1})
    runs = 0

    async def move(transaction: Transaction) -> None:
        transaction.update("users/a", {"sum": 0})
        transaction.update("users/b", {"sum": 2})

    async def check(transaction: Transaction) -> int:
        nonlocal runs
        runs += 1
        first = await transaction.get("users/a")
        if runs == 1:
            await store.transact(move)
        second = await transaction.get("users/b")
        assert first is not None
        assert second is not None
        total: int = first.data["sum"] + second.data["sum"]
        if total != 2:
            raise ArithmeticError
        return total

    assert await store.transact(check) == 2
    assert runs == 2


async def test_a_reading_transaction_sees_one_state(store: LocalStore) -> None:
    """Also when it writes nothing."""
    await store.create("users/a", {"sum": 1})
    await store.create("users/b", {"sum": 1})
    runs = 0

    async def read(transaction: Transaction) -> list[int]:
        nonlocal runs
        runs += 1
        first = await transaction.get("users/a")
        if runs == 1:
            await store.update("users/a", {"sum": 5})
            await store.update("users/b", {"sum": 5})
        second = await transaction.get("users/b")
        assert first is not None
        assert second is not None
        return [first.data["sum"], second.data["sum"]]

    assert await store.transact(read) == [5, 5]


async def test_two_hundred_watchers_all_hear(store: LocalStore) -> None:
    """Each of the change of its own document."""
    for number in range(200):
        await store.create(f"sessions/s{number}", {"number": 0})

    async def watch(number: int, ready: asyncio.Semaphore) -> int:
        async with listening(store.watch(f"sessions/s{number}")) as states:
            await anext(states)
            ready.release()
            snapshot = await soon(anext(states))
            assert snapshot is not None
            return int(snapshot.data["number"])

    ready = asyncio.Semaphore(0)
    watchers = [asyncio.ensure_future(watch(number, ready)) for number in range(200)]
    for _ in range(200):
        await soon(ready.acquire())
    for number in range(200):
        await store.update(f"sessions/s{number}", {"number": number + 1})
    assert await asyncio.gather(*watchers) == list(range(1, 201))


async def test_two_hundred_listeners_of_one_transcript(store: LocalStore) -> None:
    """Everybody gets every chunk in order."""

    async def listen(ready: asyncio.Semaphore) -> list[int]:
        seen: list[int] = []
        async with listening(store.follow(CHUNKS)) as pages:
            ready.release()
            while len(seen) < 10:
                seen += [snapshot.data["offset"] for snapshot in await soon(anext(pages))]
        return seen

    ready = asyncio.Semaphore(0)
    listeners = [asyncio.ensure_future(listen(ready)) for _ in range(200)]
    for _ in range(200):
        await soon(ready.acquire())
    for number in range(10):
        await store.create(f"{CHUNKS}/{chunk_id(number)}", {"offset": number})
    for seen in await asyncio.gather(*listeners):
        assert seen == list(range(10))


async def test_a_batch_is_bounded_in_bytes(store: LocalStore) -> None:
    """The history of a flood does not come in one piece, but it comes whole."""
    data = bytes(900_000)
    for number in range(5):
        await store.create(f"{CHUNKS}/{chunk_id(number)}", {"data": data})
    sizes: list[int] = []
    async with listening(store.follow(CHUNKS, limit=100)) as pages:
        while sum(sizes) < 5:
            sizes.append(len(await soon(anext(pages))))
    assert sizes == [3, 2]
    assert 2 * len(data) < MAX_PAGE_BYTES <= 3 * len(data)


def test_the_way_to_an_offset_does_not_depend_on_it(tmp_path: Path) -> None:
    """Following from the end of a long transcript costs as many steps of SQLite as from its start."""
    prepare(tmp_path / "pigeon.db", 1.0)
    with closing(connect(tmp_path / "pigeon.db", 1.0)) as connection:
        rows = ((CHUNKS, chunk_id(number)) for number in range(5_000))
        connection.executemany("INSERT INTO documents VALUES (?, ?, 1, NULL, x'80')", rows)

        def steps(after: str) -> int:
            counted = 0

            def tick() -> None:
                nonlocal counted
                counted += 1

            connection.set_progress_handler(tick, 1)
            page, complete = select_page(connection, CHUNKS, after, 5)
            assert (len(page), complete) == (5, False)
            return counted

        assert steps(chunk_id(4_900)) == steps(chunk_id(1))


async def test_a_chunk_costs_its_follower_one_look(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has seen everything waits; only a full page is followed by another look at once."""
    looks = 0
    read = database.read

    async def counted(operation: Callable[[sqlite3.Connection], Any]) -> Any:
        nonlocal looks
        looks += 1
        return await read(operation)

    monkeypatch.setattr(database, "read", counted)
    store = LocalStore(database, indexes=INDEXES)
    async with listening(store.follow(CHUNKS, limit=3)) as pages:
        for number in range(10):
            following = asyncio.ensure_future(anext(pages))
            await asyncio.sleep(0)  # it looks, or goes on waiting, before there is something
            await store.create(f"{CHUNKS}/{chunk_id(number)}", {"offset": number})
            assert [snapshot.data["offset"] for snapshot in await soon(following)] == [number]
    assert looks <= 1 + 10  # the first one may find nothing


@pytest.mark.slow
async def test_a_follower_keeps_up_with_a_flood(store: LocalStore) -> None:
    """100 chunks of 256 KiB arrive whole, faster than the 50 a second that a session may print."""
    chunks = [os.urandom(MAX_CHUNK_BYTES) for _ in range(4)]

    async def write() -> None:
        for number in range(100):
            await store.create(f"{CHUNKS}/{chunk_id(number)}", {"data": chunks[number % 4]})

    writer = asyncio.ensure_future(write())
    seen: list[Snapshot] = []
    async with asyncio.timeout(PATIENCE), listening(store.follow(CHUNKS)) as pages:
        while len(seen) < 100:
            seen += await anext(pages)
    await writer
    assert all(snapshot.data["data"] == chunks[number % 4] for number, snapshot in enumerate(seen))


async def test_prune_removes_what_is_expired(store: LocalStore, database: Database) -> None:
    """With its index entries, at most as many as asked, and nothing that is not expired or never expires."""
    for number in range(100):
        await store.create(f"sessions/s{number:03}", {"deadline": number, "expireAt": NOW + timedelta(seconds=number)})
    await store.create("sessions/for-ever", {"expireAt": None})
    assert await store.prune(NOW - timedelta(seconds=1), 1_000) == 0
    assert await store.prune(NOW + timedelta(seconds=79), 50) == 50
    assert await store.prune(NOW + timedelta(seconds=79), 50) == 30
    assert await store.prune(NOW + timedelta(seconds=79), 50) == 0
    left = [snapshot.id for snapshot in await store.query(Query("sessions", order_by="deadline"))]
    assert left == [f"s{number:03}" for number in range(80, 100)]
    assert await store.get("sessions/for-ever") is not None


async def test_an_extended_life_is_not_pruned(store: LocalStore) -> None:
    """The last `expireAt` counts."""
    await store.create("sessions/s1", {"expireAt": NOW})
    await store.update("sessions/s1", {"expireAt": NOW + timedelta(days=1)})
    assert await store.prune(NOW, 10) == 0


async def test_watchers_hear_of_pruning(store: LocalStore) -> None:
    """An expired document is gone for its listeners too."""
    await store.create("sessions/s1", {"expireAt": NOW})
    async with listening(store.watch("sessions/s1")) as states:
        assert await soon(anext(states)) is not None
        await store.prune(NOW, 1)
        assert await soon(anext(states)) is None


@pytest.mark.slow
async def test_pruning_gives_the_space_back(store: LocalStore, tmp_path: Path) -> None:
    """The file does not stay as large as it ever was."""
    for number in range(100):
        await store.create(f"{CHUNKS}/{number}", {"data": bytes(MAX_CHUNK_BYTES), "expireAt": NOW})
    file = tmp_path / "pigeon.db"

    async def carried() -> bool:
        return size(file) > 100 * MAX_CHUNK_BYTES

    await until(carried, "the chunks are in the file")
    assert await store.prune(NOW, 1_000) == 100

    async def shrunk() -> bool:
        return size(file) < 30 * MAX_CHUNK_BYTES

    await until(shrunk, "the space is given back")


def size(path: Path) -> int:
    """In bytes."""
    return path.stat().st_size


async def test_a_caller_that_gave_up_disturbs_nobody(store: LocalStore) -> None:
    """Cancelled calls leave the threads working."""
    for _ in range(20):
        call = asyncio.ensure_future(store.create(f"{CHUNKS}/x", {}))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await store.delete(f"{CHUNKS}/x")
    assert await store.get(f"{CHUNKS}/x") is None


async def test_a_database_that_was_never_opened_is_unavailable(tmp_path: Path) -> None:
    """An error that names itself, not a hang."""
    with pytest.raises(StoreUnavailable, match="closed"):
        await LocalStore(Database(tmp_path / "pigeon.db"), indexes={}).get("sessions/s1")
