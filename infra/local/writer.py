"""The one thread of a process that writes: what is queued goes into one transaction, each operation in a savepoint."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from infra.local.doorbell import Bells, Doorbell, Rings, bell_hash
from infra.local.schema import connect, execute_patiently
from infra.local.threads import Job, Worker, settle

T = TypeVar("T")

MAX_BATCH = 64  # operations in one transaction
OWED_PAUSE = 0.005  # seconds between tries to ring a peer whose queue is full

# After these the file may be another one, or writable again, only for a new connection.
REOPEN = {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_READONLY}


def is_broken(error: sqlite3.Error) -> bool:
    """Whether the connection should be given up after this error."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in REOPEN


class Write:
    """What an operation writes with. It may be run a second time if the first run was rolled back."""

    __slots__ = ("_numbers", "_rings", "execute")

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.execute = connection.execute
        self._numbers: list[int] = []
        self._rings: set[bytes] = set()

    def number(self) -> int:
        """The next number of the database-wide counter: message ids, versions and turns come from it."""
        ((value,),) = self.execute("UPDATE counter SET value = value + 1 RETURNING value").fetchall()
        self._numbers.append(value)
        return int(value)

    def ring(self, bell: str) -> None:
        """Wake those who wait for this bell once the transaction is committed."""
        if not self._numbers:
            self.number()  # a commit that rings must show in the counter, or its loss would not be noticed
        self._rings.add(bell_hash(bell))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job went: its result, or the exception that rolled it back."""

    job: Job[Write, Any]
    write: Write | None = None
    result: Any = None
    error: BaseException | None = None


class Writer(Worker):
    """Owns the writing connection. `submit` is for the event loop; everything else happens on the thread."""

    def __init__(self, path: Path, lock_timeout: float, doorbell: Doorbell, bells: Bells) -> None:
        super().__init__("sqlite-writer")
        self._path = path
        self._lock_timeout = lock_timeout
        self._doorbell = doorbell
        self._bells = bells
        self._queue: SimpleQueue[Job[Write, Any] | None] = SimpleQueue()
        self._connection: sqlite3.Connection | None = None
        self._owes = False

    def submit(self, operation: Callable[[Write], T]) -> asyncio.Future[T]:
        """Queue an operation. The future raises sqlite3.Error, or what the operation raised; then it wrote nothing."""
        job = Job(operation, self._loop.create_future())
        self._queue.put(job)
        return job.future

    async def close(self) -> None:
        """Commit what is queued and end the thread."""
        self._queue.put(None)
        await super().close()

    def run(self) -> None:
        """Commit one batch after another until told to end."""
        while batch := self._take():
            jobs = [job for job in batch if job is not None]
            if jobs:
                self._publish(self._commit(jobs))
            if None in batch:
                break
        self._disconnect()

    def _take(self) -> list[Job[Write, Any] | None]:
        batch = [self._wait()]
        while batch[-1] is not None and len(batch) < MAX_BATCH:
            try:
                batch.append(self._queue.get_nowait())
            except Empty:
                break
        return batch

    def _wait(self) -> Job[Write, Any] | None:
        while self._owes:
            try:
                return self._queue.get(timeout=OWED_PAUSE)
            except Empty:
                self._owes = self._doorbell.flush()
        return self._queue.get()

    def _commit(self, jobs: Sequence[Job[Write, Any]]) -> list[Outcome]:
        """Run the jobs in one transaction; if the transaction itself is lost, each gets one of its own."""
        try:
            connection = self._begin()
        except sqlite3.Error as error:
            self._give_up(error)
            return [Outcome(job, error=error) for job in jobs]
        try:
            outcomes = [_step(connection, job) for job in jobs]
            connection.execute("COMMIT")
            return outcomes
        except sqlite3.Error as error:
            self._roll_back(connection)
            self._give_up(error)
            if len(jobs) == 1:
                return [Outcome(jobs[0], error=error)]
        return [outcome for job in jobs for outcome in self._commit([job])]

    def _begin(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = connect(self._path, self._lock_timeout)
            self._connection.execute("PRAGMA busy_timeout = 0")  # execute_patiently waits better
        execute_patiently(self._connection, "BEGIN IMMEDIATE", self._lock_timeout)
        return self._connection

    def _publish(self, outcomes: list[Outcome]) -> None:
        """Hand the results to the event loop, then ring at the other processes."""
        rings = _merge([outcome.write for outcome in outcomes if outcome.write is not None])
        self._loop.call_soon_threadsafe(self._deliver, outcomes, rings)
        if rings is not None:
            self._owes = self._doorbell.announce(rings)

    def _deliver(self, outcomes: list[Outcome], rings: Rings | None) -> None:
        for outcome in outcomes:
            settle(outcome.job.future, outcome.result, outcome.error)
        if rings is not None:
            self._bells.ring(rings)

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._disconnect()

    def _give_up(self, error: sqlite3.Error) -> None:
        if is_broken(error):
            self._disconnect()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _step(connection: sqlite3.Connection, job: Job[Write, Any]) -> Outcome:
    """Run one job in its savepoint. Raises sqlite3.Error if the transaction, or the connection, is gone with it."""
    write = Write(connection)
    connection.execute("SAVEPOINT job")
    try:
        outcome = Outcome(job, write, job.operation(write))
    except Exception as error:
        if isinstance(error, sqlite3.Error) and (is_broken(error) or not connection.in_transaction):
            raise
        connection.execute("ROLLBACK TO job")
        outcome = Outcome(job, error=error)
    connection.execute("RELEASE job")
    return outcome


def _merge(writes: list[Write]) -> Rings | None:
    """What the commit of these announces; None if it moved no number."""
    numbers = [number for write in writes for number in write._numbers]
    if not numbers:
        return None
    hashes = frozenset[bytes]().union(*(write._rings for write in writes))
    return Rings(min(numbers) - 1, max(numbers), hashes)
