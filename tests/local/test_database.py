"""The file, its threads, and what happens when the disk does not play along."""

from __future__ import annotations

import asyncio
import os
import resource
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from infra.clock import SystemClock
from infra.local.bus import LocalBus
from infra.local.database import Database
from infra.local.schema import SCHEMA_VERSION, UnknownSchema
from infra.local.store import LocalStore
from infra.local.writer import Write
from schemas.errors import AlreadyExists, BusUnavailable, StoreUnavailable
from schemas.ports import Message, Subscription
from tests.contracts.waiting import soon, take
from tests.waiting import until

READER = Subscription("reader", "topic")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the file is."""
    return tmp_path / "pigeon.db"


@pytest.fixture
async def database(path: Path) -> AsyncIterator[Database]:
    """An open database."""
    async with Database(path, lock_timeout=0.2) as database:
        yield database


def open_store(database: Database) -> LocalStore:
    """A store without indexes."""
    return LocalStore(database, indexes={})


def open_bus(database: Database) -> LocalBus:
    """A bus with one subscription."""
    return LocalBus(database, topics=["topic"], subscriptions=[READER], clock=SystemClock())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB; skips where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def size(path: Path) -> int:
    """In bytes."""
    return path.stat().st_size


def write_file(path: Path, data: bytes) -> None:
    """Put these bytes there."""
    path.write_bytes(data)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Somebody else writes, and does not come to an end."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    yield
    connection.execute("ROLLBACK")
    connection.close()


async def test_many_open_a_new_file_at_once(path: Path) -> None:
    """Gateway and workers may all start at the same moment."""
    databases = [Database(path) for _ in range(8)]
    await asyncio.gather(*(database.open() for database in databases))
    await asyncio.gather(*(open_store(database).create(f"a/{id(database)}", {}) for database in databases))
    await asyncio.gather(*(database.close() for database in databases))


@pytest.mark.usefixtures("database")
def test_only_the_owner_can_read_the_file(path: Path) -> None:
    """What people typed is in it."""
    assert path.stat().st_mode & 0o077 == 0


async def test_a_newer_file_is_refused(path: Path) -> None:
    """An old program says so, and leaves the file as it is."""
    async with Database(path):
        pass
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(UnknownSchema, match="use the newer program"):
        await Database(path).open()


async def test_a_foreign_file_is_refused(path: Path) -> None:
    """Tables of another program are not mixed with ours."""
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE other (value)")
    connection.close()
    with pytest.raises(UnknownSchema):
        await Database(path).open()


async def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    """With the cause chained."""
    write_file(path, b"not a database at all" * 1_000)
    with pytest.raises(StoreUnavailable) as caught:
        await Database(path).open()
    assert isinstance(caught.value.__cause__, sqlite3.DatabaseError)


async def test_what_was_written_is_there_after_reopening(path: Path) -> None:
    """Closing loses nothing."""
    async with Database(path) as database:
        await open_store(database).create("sessions/s1", {"state": "ready"})
        await open_bus(database).publish("topic", Message(b"x"))
    async with Database(path) as database:
        assert await open_store(database).get("sessions/s1") is not None
        async with open_bus(database).pull(READER) as deliveries:
            assert (await soon(anext(deliveries))).message == Message(b"x")


async def test_a_closed_database_is_unavailable(path: Path) -> None:
    """Calls after the close, and iterators that wait at that moment, end with an error rather than never."""
    async with Database(path) as database:
        store, bus = open_store(database), open_bus(database)
        states = store.watch("sessions/s1")
        await anext(states)
        late = asyncio.ensure_future(soon(anext(states)))
        async with bus.pull(READER) as deliveries:
            idle = asyncio.ensure_future(soon(anext(deliveries)))
            await asyncio.sleep(0)
            await database.close()
            with pytest.raises(BusUnavailable):
                await idle
    with pytest.raises(StoreUnavailable):
        await late
    with pytest.raises(StoreUnavailable):
        await store.get("sessions/s1")
    with pytest.raises(BusUnavailable):
        await bus.publish("topic", Message(b"x"))


async def test_queued_writes_share_a_commit(path: Path, database: Database) -> None:
    """Twenty sessions do not pay twenty commits."""
    statements: list[str] = []

    def trace(write: Write) -> None:
        connection: Any = write.execute.__self__  # type: ignore[attr-defined]
        connection.set_trace_callback(statements.append)

    await database.write(trace)
    store = open_store(database)
    await store.create("sessions/first", {})
    with locked(path):
        writes = [asyncio.ensure_future(store.create(f"sessions/s{number}", {})) for number in range(20)]
        await asyncio.sleep(0)
        statements.clear()
    await asyncio.gather(*writes)
    assert statements.count("COMMIT") <= 3


async def test_one_failure_leaves_the_others_of_its_commit(path: Path, database: Database) -> None:
    """Each operation is undone for itself."""
    store = open_store(database)
    await store.create("sessions/s3", {})
    with locked(path):
        writes = [asyncio.ensure_future(store.create(f"sessions/s{number}", {})) for number in range(6)]
        await asyncio.sleep(0)
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert [isinstance(result, AlreadyExists) for result in results] == [number == 3 for number in range(6)]


async def test_a_lost_transaction_is_made_again_one_by_one(path: Path, database: Database) -> None:
    """When one operation takes the whole transaction with it, the others still succeed."""

    def explode(write: Write) -> None:
        write.execute("ROLLBACK")  # as SQLite itself does after some errors
        raise sqlite3.OperationalError("disk I/O error")

    store = open_store(database)
    await store.create("sessions/first", {})
    with locked(path):
        writes: list[asyncio.Future[Any]] = [asyncio.ensure_future(store.create("sessions/s0", {}))]
        await asyncio.sleep(0)
        writes += [database.submit(explode), asyncio.ensure_future(store.create("sessions/s1", {}))]
        await asyncio.sleep(0)
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert [type(result) for result in results] == [str, sqlite3.OperationalError, str]
    assert await store.get("sessions/s0") is not None
    assert await store.get("sessions/s1") is not None


async def test_a_lock_held_too_long_is_unavailable(path: Path, database: Database) -> None:
    """After the lock time-out, with nothing written; it works again once the lock is gone."""
    store, bus = open_store(database), open_bus(database)
    await store.create("sessions/first", {})
    with locked(path):
        with pytest.raises(StoreUnavailable, match="locked") as caught:
            await soon(store.create("sessions/s1", {}))
        with pytest.raises(BusUnavailable, match="locked"):
            await soon(bus.publish("topic", Message(b"x")))
        assert await store.get("sessions/first") is not None  # reading goes on
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    assert await store.get("sessions/s1") is None
    await store.create("sessions/s1", {})


async def test_a_full_disk_is_unavailable_until_there_is_room(database: Database) -> None:
    """Nothing half-written; what fits is still written; it recovers without being opened again."""
    store, bus = open_store(database), open_bus(database)
    await store.create("sessions/s1", {"data": b"kept"})

    def limit(write: Write) -> None:
        ((pages,),) = write.execute("PRAGMA page_count").fetchall()
        write.execute(f"PRAGMA max_page_count = {pages + 10}").fetchall()

    await database.write(limit)
    with pytest.raises(StoreUnavailable, match="full"):
        await store.update("sessions/s1", {"data": bytes(500_000)})
    with pytest.raises(BusUnavailable, match="full"):
        await bus.publish("topic", Message(bytes(500_000)))
    snapshot = await store.get("sessions/s1")
    assert snapshot is not None
    assert snapshot.data == {"data": b"kept"}
    await store.create("sessions/small", {})
    await database.write(lambda write: write.execute("PRAGMA max_page_count = 1000000").fetchall())
    await store.update("sessions/s1", {"data": bytes(500_000)})
    await bus.publish("topic", Message(b"afterwards"))
    async with bus.pull(READER) as deliveries:
        assert (await soon(anext(deliveries))).message.data == b"afterwards"


async def test_a_failing_disk_is_unavailable_until_it_works(path: Path, database: Database) -> None:
    """A file-size limit makes every write an I/O error; the connection is made anew afterwards."""
    store = open_store(database)
    await store.create("sessions/s1", {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size(path.with_name("pigeon.db-wal")), hard))
    try:
        with pytest.raises(StoreUnavailable, match="I/O error"):
            await store.create("sessions/s2", {"data": bytes(900_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert await store.get("sessions/s2") is None
    await store.create("sessions/s2", {"data": bytes(900_000)})


async def test_a_read_only_connection_is_made_anew(database: Database) -> None:
    """A file that was read-only for a while is written again without a restart."""
    store = open_store(database)
    await store.create("sessions/s1", {})
    await database.write(lambda write: write.execute("PRAGMA query_only = 1"))
    with pytest.raises(StoreUnavailable, match="readonly"):
        await store.create("sessions/s2", {})
    await store.create("sessions/s2", {})


async def test_a_really_full_disk(small_disk: Path) -> None:
    """On a small file system: refused when full, written when there is room again, and nothing was lost."""
    ballast = small_disk / "ballast"
    write_file(ballast, bytes(1_500_000))
    async with Database(small_disk / "pigeon.db") as database:
        store = open_store(database)
        written = await fill(store)
        ballast.unlink()
        await store.create("sessions/after", {"data": bytes(1_000)})
    async with Database(small_disk / "pigeon.db") as database:
        for path, data in written.items():
            snapshot = await open_store(database).get(path)
            assert snapshot is not None
            assert snapshot.data == {"data": data}
        assert await open_store(database).get("sessions/after") is not None


async def fill(store: LocalStore) -> dict[str, bytes]:
    """Create documents until that is refused; returns what was written."""
    written: dict[str, bytes] = {}
    for number in range(100):
        data = bytes([number]) * 100_000
        try:
            await store.create(f"sessions/s{number}", {"data": data})
        except StoreUnavailable:
            return written
        written[f"sessions/s{number}"] = data
    raise AssertionError("the disk never became full")


async def test_a_lost_ring_is_made_up_for(path: Path, database: Database) -> None:
    """A listener that a ring cannot reach sees the write all the same, a second later."""
    async with Database(path) as deaf:
        pages = open_store(deaf).follow("sessions/s1/chunks")
        waiting = asyncio.ensure_future(take(pages, 1))
        for _ in range(3):
            await open_store(deaf).get("sessions/s1")  # the listener has looked by now
        for bell in path.with_name("pigeon.db-bells").iterdir():
            bell.unlink()
        await open_store(database).create("sessions/s1/chunks/0", {})
        assert await soon(waiting, 5.0)
        await pages.aclose()  # type: ignore[attr-defined]


async def test_the_log_is_carried_into_the_file(path: Path, database: Database) -> None:
    """Without anybody's commit having to wait for it."""
    store = open_store(database)
    before = size(path)
    for number in range(10):
        await store.create(f"sessions/s{number}", {"data": bytes(100_000)})

    async def carried() -> bool:
        return size(path) >= before + 1_000_000

    await until(carried, "the log is in the file")


async def test_closing_leaves_no_socket_and_no_log(path: Path) -> None:
    """A clean end leaves the file alone."""
    async with Database(path) as database:
        await open_store(database).create("sessions/s1", {})
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["pigeon.db", "pigeon.db-bells"]
    assert list(path.with_name("pigeon.db-bells").iterdir()) == []


async def test_closing_leaves_no_log_however_many_threads_have_read(path: Path) -> None:
    """Of connections that close at the same moment none is the last one, which takes the log away."""
    for _ in range(60):
        async with Database(path) as database:
            store = open_store(database)
            await asyncio.gather(*(store.get("sessions/s1") for _ in range(20)))
        assert sorted(entry.name for entry in path.parent.iterdir()) == ["pigeon.db", "pigeon.db-bells"]
