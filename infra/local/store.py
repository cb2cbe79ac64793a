"""Documents in the SQLite file, with the promises of Firestore."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from functools import partial
from typing import TypeVar

from infra.local import documents
from infra.local.database import Database, translated
from infra.local.documents import Change, collection_bell, document_bell
from infra.local.indexes import Indexes, plan, rebuild
from infra.local.values import check_collection, check_id, split_path
from infra.local.writer import Write
from infra.transactions import Contention, Dialect, OptimisticTransaction, Reads, Stale
from schemas.errors import StoreUnavailable, TooLarge
from schemas.limits import MAX_COMMIT_BYTES
from schemas.ports import Fields, Query, Snapshot, Transaction

T = TypeVar("T")

RETRY_PAUSE = 0.001  # seconds at most before a transaction's second try, growing with each
PRUNE_BATCH = 8  # documents removed in one operation, so that no write waits long behind it
SHRINK_ROUNDS = 100  # operations that give space back, after one pruning


class LocalStore:
    """Implements schemas.ports.Store on a Database; `indexes` is as in schemas.documents.INDEXES.

    Beyond the port's errors, a bad path, field name or query raises ValueError, and a value that a document cannot
    hold TypeError.
    """

    def __init__(self, database: Database, *, indexes: Indexes) -> None:
        self._database = database
        self._indexes = indexes
        self._indexed = False
        self._contention = Contention(RETRY_PAUSE)
        self._dialect = Dialect(partial(documents.creation, indexes), documents.update, documents.deletion)

    async def get(self, path: str) -> Snapshot | None:
        """See Store.get."""
        split_path(path)
        with translated(StoreUnavailable):
            return await self._database.read(lambda connection: documents.select(connection, path))

    async def create(self, path: str, data: Fields) -> str:
        """See Store.create."""
        return await self._apply([documents.creation(self._indexes, path, data)])

    async def update(self, path: str, fields: Fields, *, expect: str | None = None) -> str:
        """See Store.update."""
        return await self._apply([documents.update(path, fields, expect)])

    async def delete(self, path: str) -> None:
        """See Store.delete."""
        await self._apply([documents.deletion(path)])

    async def transact(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """See Store.transact. Optimistic: what was read is checked again in the commit."""
        return await self._contention.settle(partial(self._try, work))

    async def query(self, query: Query) -> list[Snapshot]:
        """See Store.query."""
        planned = plan(self._indexes, query)
        await self._build_indexes()
        with translated(StoreUnavailable):
            return await self._database.read(
                lambda connection: documents.select_plan(connection, query.collection, planned)
            )

    async def watch(self, path: str) -> AsyncIterator[Snapshot | None]:
        """See Store.watch."""
        split_path(path)
        seen: str | None = ""
        with self._database.bell(document_bell(path)) as bell:
            while True:
                bell.clear()
                snapshot = await self.get(path)
                version = None if snapshot is None else snapshot.version
                if version != seen:
                    seen = version
                    yield snapshot
                await bell.wait()

    async def follow(self, collection: str, *, after: str = "", limit: int = 32) -> AsyncIterator[list[Snapshot]]:
        """See Store.follow."""
        check_collection(collection)
        if after:
            check_id(after)
        if limit < 1:
            raise ValueError("a batch holds at least one document")
        with self._database.bell(collection_bell(collection)) as bell:
            while True:
                bell.clear()
                page, complete = await self._page(collection, after, limit)
                if page:
                    after = page[-1].id
                    yield page
                if complete:  # what was created since has rung
                    await bell.wait()

    async def prune(self, now: datetime, limit: int) -> int:
        """Remove at most `limit` documents whose `expireAt` is not after `now`; returns how many were removed.

        Stands in for Firestore's TTL policy. Raises StoreUnavailable; what was removed until then stays so.
        """
        removed = 0
        while removed < limit:
            batch = min(PRUNE_BATCH, limit - removed)
            count = await self._write(partial(documents.prune, now=now, limit=batch))
            removed += count
            if count < batch:
                break
        for _ in range(SHRINK_ROUNDS):
            if not await self._write(documents.shrink):
                break
        return removed

    async def _try(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """One run of a transaction. Raises Stale when it has to run again."""
        transaction = OptimisticTransaction(self.get, self._dialect)
        try:
            result = await work(transaction)
        except StoreUnavailable:
            raise
        except Exception:
            await self._commit(transaction.reads, [])  # what it saw may never have been there at one time
            raise
        await self._commit(transaction.reads, transaction.changes)
        return result

    async def _commit(self, reads: Reads, changes: list[Change]) -> None:
        if not changes and len(reads) < 2:
            return
        size = sum(len(change.body) for change in changes)
        if size > MAX_COMMIT_BYTES:
            raise TooLarge(f"the transaction writes {size} bytes; a commit takes {MAX_COMMIT_BYTES}")

        def commit(write: Write) -> None:
            if not documents.unchanged(write, reads):
                raise Stale
            if changes:
                documents.apply(write, self._indexes, changes)

        await self._write(commit)

    async def _apply(self, changes: list[Change]) -> str:
        return await self._write(lambda write: documents.apply(write, self._indexes, changes))

    async def _write(self, operation: Callable[[Write], T]) -> T:
        await self._build_indexes()
        with translated(StoreUnavailable):
            return await self._database.write(operation)

    async def _page(self, collection: str, after: str, limit: int) -> tuple[list[Snapshot], bool]:
        with translated(StoreUnavailable):
            return await self._database.read(
                lambda connection: documents.select_page(connection, collection, after, limit)
            )

    async def _build_indexes(self) -> None:
        """Before the first write and the first query: another version of the program may have declared others."""
        if not self._indexed:
            with translated(StoreUnavailable):
                await self._database.write(lambda write: rebuild(self._indexes, write))
            self._indexed = True
