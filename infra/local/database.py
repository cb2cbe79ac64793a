"""One SQLite file, shared by the bus and the store and by any number of processes. No call blocks the event loop."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

from infra.local.doorbell import Bells, Doorbell
from infra.local.schema import connect, prepare
from infra.local.threads import Job, Worker, settle
from infra.local.writer import Write, Writer, is_broken
from schemas.errors import StoreUnavailable, Unavailable

T = TypeVar("T")

LOCK_TIMEOUT = 5.0  # seconds a write waits for the other processes before it is refused
READERS = 2  # so that a page of a long transcript does not hold up a small read
KEEP_EVERY = 0.5  # seconds; twice this is how long a lost ring goes unnoticed
RESTART_PAGES = 16_384  # a log longer than this is wound back even if writers must wait for it (64 MiB)


class DatabaseClosed(sqlite3.OperationalError):
    """A call after close()."""


@contextmanager
def translated(error: type[Unavailable]) -> Iterator[None]:
    """Turn what SQLite says into `error`, with the cause chained."""
    try:
        yield
    except (sqlite3.Error, OSError) as cause:
        raise error(f"{type(cause).__name__}: {cause}") from cause


class Database:
    """The file at `path`, as an async context manager.

    Whatever was committed survives a killed process, not a power cut. Every wait for a lock of another process ends
    after `lock_timeout` seconds. Next to the file are SQLite's log and a directory of sockets (`PATH-bells`).
    """

    def __init__(self, path: Path, *, lock_timeout: float = LOCK_TIMEOUT) -> None:
        self._path = path.absolute()
        self._lock_timeout = lock_timeout
        self._opened = False
        self._threads: list[Worker] = []
        self._bells = Bells()

    @property
    def closed(self) -> bool:
        """Whether it is closed, or was never opened."""
        return not self._opened

    async def open(self) -> None:
        """Create what is missing and start the threads. Raises UnknownSchema or StoreUnavailable."""
        with translated(StoreUnavailable):
            await asyncio.to_thread(prepare, self._path, self._lock_timeout)
            self._doorbell = Doorbell(self._path.with_name(self._path.name + "-bells"), self._bells)
            self._doorbell.open()
        self._writer = Writer(self._path, self._lock_timeout, self._doorbell, self._bells)
        self._reads: SimpleQueue[Job[sqlite3.Connection, Any] | None] = SimpleQueue()
        readers = [Reader(self._path, self._lock_timeout, self._reads) for _ in range(READERS)]
        self._threads = [self._writer, *readers, Keeper(self._path, self._bells)]
        for thread in self._threads:
            thread.start()
        self._opened = True
        try:
            self._bells.start(await self.read(_read_counter))
        except sqlite3.Error as error:
            await self.close()
            raise StoreUnavailable(f"{self._path} cannot be read: {error}") from error

    async def close(self) -> None:
        """Commit what is queued and end the threads; whoever waits for a bell finds the database closed."""
        if not self._opened:
            return
        self._opened = False
        for _ in range(READERS):
            self._reads.put(None)
        await asyncio.gather(*(thread.close() for thread in self._threads))
        await asyncio.to_thread(self._tidy)
        self._doorbell.close()
        self._bells.ring_all()

    def _tidy(self) -> None:
        """SQLite takes its log away with the last connection, and of those that close at the same moment none is the
        last: so one more does, alone."""
        with suppress(sqlite3.Error):
            if self._path.exists():
                with closing(connect(self._path, self._lock_timeout)) as connection:
                    _read_counter(connection)

    async def __aenter__(self) -> Database:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def bell(self, name: str) -> AbstractContextManager[asyncio.Event]:
        """See Bells.bell."""
        return self._bells.bell(name)

    def submit(self, operation: Callable[[Write], T]) -> asyncio.Future[T]:
        """Queue a write. Its future raises sqlite3.Error, or what the operation raised; then nothing was written.

        The operation runs on another thread, perhaps twice, and only writes through its argument.
        """
        if not self._opened:
            raise DatabaseClosed("the database is closed")
        return self._writer.submit(operation)

    async def write(self, operation: Callable[[Write], T]) -> T:
        """Queue a write and wait until it is committed."""
        return await self.submit(operation)

    async def read(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """Run a read on another thread; it sees every commit that returned. Raises sqlite3.Error."""
        if not self._opened:
            raise DatabaseClosed("the database is closed")
        job: Job[sqlite3.Connection, T] = Job(operation, asyncio.get_running_loop().create_future())
        self._reads.put(job)
        return await job.future


def _read_counter(connection: sqlite3.Connection) -> int:
    ((value,),) = connection.execute("SELECT value FROM counter").fetchall()
    return int(value)


class Reader(Worker):
    """Takes reads from a queue that it shares with its siblings, until it takes None."""

    def __init__(self, path: Path, lock_timeout: float, jobs: SimpleQueue[Job[sqlite3.Connection, Any] | None]) -> None:
        super().__init__("sqlite-reader")
        self._path = path
        self._lock_timeout = lock_timeout
        self._jobs = jobs
        self._connection: sqlite3.Connection | None = None

    def run(self) -> None:
        """Answer reads until told to end."""
        while (job := self._jobs.get()) is not None:
            result, error = self._answer(job)
            self._loop.call_soon_threadsafe(settle, job.future, result, error)
            del job, result, error  # a page of a transcript is not kept while waiting
        self._disconnect()

    def _answer(self, job: Job[sqlite3.Connection, Any]) -> tuple[Any, BaseException | None]:
        try:
            if self._connection is None:
                self._connection = connect(self._path, self._lock_timeout)
            return job.operation(self._connection), None
        except Exception as error:
            if isinstance(error, sqlite3.Error) and is_broken(error):
                self._disconnect()
            return None, error

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Keeper(Worker):
    """Carries the log into the file, away from commits, and looks for rings that got lost."""

    def __init__(self, path: Path, bells: Bells) -> None:
        super().__init__("sqlite-keeper")
        self._path = path
        self._bells = bells
        self._stop = threading.Event()
        self._carried = -1

    async def close(self) -> None:
        """End after the round in progress."""
        self._stop.set()
        await super().close()

    def run(self) -> None:
        """One round after another until told to end; what a round cannot do the next one will."""
        while not self._stop.wait(KEEP_EVERY):
            try:
                connection = connect(self._path, lock_timeout=KEEP_EVERY)
            except sqlite3.Error:
                continue
            try:
                while not self._stop.wait(KEEP_EVERY):
                    self._round(connection)
            except sqlite3.Error:
                pass
            finally:
                connection.close()

    def _round(self, connection: sqlite3.Connection) -> None:
        counter = _read_counter(connection)
        self._loop.call_soon_threadsafe(self._bells.audit, counter)
        (version,) = connection.execute("PRAGMA data_version").fetchall()[0]
        if version != self._carried:
            self._carry(connection)
            self._carried = version

    def _carry(self, connection: sqlite3.Connection) -> None:
        ((_, pages, _),) = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        if pages > RESTART_PAGES:
            connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
