"""Optimistic transactions for every store: reads are remembered with their versions, and checked in the commit."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from schemas.errors import Conflict, PigeonError
from schemas.ports import Fields, Snapshot

T = TypeVar("T")
Change = TypeVar("Change")

MAX_TRIES = 12  # of a transaction

Reads = dict[str, str | None]  # the version of each document that was read; None where there was none


class Stale(PigeonError):
    """What a transaction read has changed since: it runs again."""


@dataclass(frozen=True, slots=True)
class Dialect(Generic[Change]):
    """How a store writes its changes down."""

    creation: Callable[[str, Fields], Change]
    update: Callable[[str, Fields], Change]
    deletion: Callable[[str], Change]


class OptimisticTransaction(Generic[Change]):
    """Implements schemas.ports.Transaction: remembers what was read, and what is to be written."""

    def __init__(self, get: Callable[[str], Awaitable[Snapshot | None]], dialect: Dialect[Change]) -> None:
        self._get = get
        self._dialect = dialect
        self.reads: Reads = {}
        self.changes: list[Change] = []

    async def get(self, path: str) -> Snapshot | None:
        """See Transaction.get. A document read twice is the same, or the transaction runs again."""
        if self.changes:
            raise RuntimeError("a transaction reads before it writes")
        snapshot = await self._get(path)
        version = None if snapshot is None else snapshot.version
        if self.reads.setdefault(path, version) != version:
            raise Stale
        return snapshot

    def create(self, path: str, data: Fields) -> None:
        """See Transaction.create."""
        self.changes.append(self._dialect.creation(path, data))

    def update(self, path: str, fields: Fields) -> None:
        """See Transaction.update."""
        self.changes.append(self._dialect.update(path, fields))

    def delete(self, path: str) -> None:
        """See Transaction.delete."""
        self.changes.append(self._dialect.deletion(path))


class Contention:
    """Runs transactions until one try is not stale; those of a process that lost a race go one after another.

    `pause` is how many seconds at most to wait before the second try, growing with each.
    """

    def __init__(self, pause: float) -> None:
        self._pause = pause
        self._losers = asyncio.Lock()

    async def settle(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """The result of the first try that is not stale. Raises Conflict after MAX_TRIES, and what a try raises."""
        try:
            return await attempt()
        except Stale:
            pass
        async with self._losers:
            for number in range(1, MAX_TRIES):
                await asyncio.sleep(random.uniform(0, number * self._pause))  # noqa: S311
                try:
                    return await attempt()
                except Stale:
                    continue
        raise Conflict(f"other writers came first {MAX_TRIES} times")
