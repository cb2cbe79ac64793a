"""Documents in Firestore, or in its emulator."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import google.auth
import grpc.aio
from google.cloud.firestore_v1.services.firestore.transports import FirestoreGrpcAsyncIOTransport

from infra.adapters import firestore_writes as writes
from infra.adapters.firestore_calls import Calls, ReadRequest
from infra.adapters.firestore_listen import listener
from infra.adapters.firestore_queries import newest_target, query_request
from infra.adapters.firestore_values import Database, Message, version_of
from infra.adapters.firestore_writes import Change
from infra.clock import ServiceClock, SystemClock
from infra.local.indexes import Indexes, check_query
from infra.local.values import check_collection, check_id, split_path
from infra.transactions import Contention, Dialect, OptimisticTransaction, Reads, Stale
from schemas.errors import AlreadyExists, Conflict, NotFound, StoreUnavailable
from schemas.ids import new_id
from schemas.limits import MIB
from schemas.ports import Fields, Query, Snapshot, Transaction

T = TypeVar("T")
logger = logging.getLogger(__name__)

START_TRIES = 3  # of the first call, of CALL_SECONDS each
RETRY_PAUSE = 0.02  # seconds at most before a transaction's second try, growing with each
MAX_PAGE_BYTES = 2 * MIB  # of one page of history; a larger document comes alone
LISTENED = 2  # newest documents that a listener sees: the emulator sends all of them again with each new one
FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0  # seconds before a listener that was cut off is opened again, doubling

SIZES = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
QUIET_SECONDS = 30.0  # a follower looks anew after this: a listener that missed a document would be silent
RECONNECTS = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 2_000))
KEEPALIVES = (("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 10_000))
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)  # else equal channels share one, and its limit of streams


@asynccontextmanager
async def firestore_store(
    project: str,
    *,
    indexes: Indexes,
    database: str = "(default)",
    emulator: str = "",
    clock: ServiceClock | None = None,
    interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
) -> AsyncIterator[FirestoreStore]:
    """A client of one database; `emulator` is the "host:port" of an emulator, "" is the cloud with the credentials
    of the environment. Raises google.auth's DefaultCredentialsError where there are none.

    A `clock` is set by a commit at once, and kept right by every other one. Raises StoreUnavailable where that first
    one fails: who cannot know the time must not judge by it.
    """
    named = Database(project, database)
    metadata = [
        ("google-cloud-resource-prefix", named.name),
        ("x-goog-request-params", f"project_id={project}&database_id={database}"),
    ]
    if emulator:
        connect = partial(_connect_emulator, emulator, interceptors)
        metadata.append(("authorization", "Bearer owner"))  # the emulator's name for who may do everything
    else:
        credentials, _ = await asyncio.to_thread(google.auth.default, FirestoreGrpcAsyncIOTransport.AUTH_SCOPES)
        connect = partial(_connect_cloud, credentials, interceptors)
    calls = Calls(connect, metadata, clock or ServiceClock(SystemClock()))
    store = FirestoreStore(calls, named, indexes=indexes)
    try:
        if clock is not None:
            await store.ask_time()
        yield store
    finally:
        await calls.close()


def _connect_emulator(host: str, interceptors: Sequence[grpc.aio.ClientInterceptor]) -> grpc.aio.Channel:
    options = (*SIZES, *RECONNECTS, *OWN_CONNECTION)  # its server ends connections that keep alive
    return grpc.aio.insecure_channel(host, options=options, interceptors=interceptors)


def _connect_cloud(credentials: Any, interceptors: Sequence[grpc.aio.ClientInterceptor]) -> grpc.aio.Channel:
    options = (*SIZES, *RECONNECTS, *KEEPALIVES, *OWN_CONNECTION)
    return FirestoreGrpcAsyncIOTransport.create_channel(
        credentials=credentials, options=options, interceptors=interceptors
    )


class FirestoreStore:
    """Implements schemas.ports.Store; `indexes` is as in schemas.documents.INDEXES. Made by `firestore_store`.

    Beyond the port's errors, a bad path, field name or query raises ValueError, and a value that a document cannot
    hold TypeError. A call takes at most firestore_calls.CALL_SECONDS; listeners outlast every outage.
    """

    def __init__(self, calls: Calls, database: Database, *, indexes: Indexes) -> None:
        self._calls = calls
        self._database = database
        self._indexes = indexes
        self._contention = Contention(RETRY_PAUSE)
        self._dialect = Dialect(
            partial(writes.creation, database), partial(writes.update, database), partial(writes.deletion, database)
        )

    async def get(self, path: str) -> Snapshot | None:
        """See Store.get."""
        split_path(path)
        request = ReadRequest(database=self._database.name, documents=[self._database.document(path)])
        (answer,) = await self._calls.read(request)
        return self._database.snapshot(answer.found) if answer.HasField("found") else None

    async def create(self, path: str, data: Fields) -> str:
        """See Store.create."""
        return await self._commit([writes.creation(self._database, path, data)], repeatable=True)

    async def update(self, path: str, fields: Fields, *, expect: str | None = None) -> str:
        """See Store.update."""
        change = writes.update(self._database, path, fields)
        if expect is None:
            return await self._commit([change], repeatable=False)
        try:
            return await self._commit([writes.expect(change, expect)], repeatable=True)
        except Conflict:
            if await self.get(path) is None:
                raise NotFound(f"there is no {path}") from None
            raise

    async def delete(self, path: str) -> None:
        """See Store.delete."""
        await self._commit([writes.deletion(self._database, path)], repeatable=False)

    async def ask_time(self) -> None:
        """Set the clock by a commit of which nothing stays. Raises StoreUnavailable after START_TRIES calls in vain: a
        store that has just been started itself is slow at first."""
        nothing = writes.deletion(self._database, f"clocks/{new_id()}")
        for last in (False,) * (START_TRIES - 1) + (True,):
            try:
                await self._commit([nothing], repeatable=True)
            except StoreUnavailable:
                if last:
                    raise
            else:
                return

    async def transact(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """See Store.transact. Optimistic: what was read is a precondition of the commit."""
        return await self._contention.settle(partial(self._try, work))

    async def query(self, query: Query) -> list[Snapshot]:
        """See Store.query."""
        check_query(self._indexes, query)
        found = await self._calls.query(query_request(self._database, query))
        return [self._database.snapshot(document) for document in found]

    async def watch(self, path: str) -> AsyncIterator[Snapshot | None]:
        """See Store.watch."""
        split_path(path)
        seen: str | None = ""
        outage = Outage()
        while True:
            try:
                async with aclosing(self._states(path)) as states:
                    async for snapshot in states:
                        outage.over()
                        version = None if snapshot is None else snapshot.version
                        if version != seen:
                            seen = version
                            yield snapshot
            except StoreUnavailable as error:
                if self._calls.closed:
                    raise
                await outage.wait(error)

    async def follow(self, collection: str, *, after: str = "", limit: int = 32) -> AsyncIterator[list[Snapshot]]:
        """See Store.follow."""
        check_collection(collection)
        if after:
            check_id(after)
        if limit < 1:
            raise ValueError("a batch holds at least one document")
        outage = Outage()
        while True:
            try:
                async with aclosing(self._onward(collection, after, limit)) as batches:
                    async for batch in batches:
                        outage.over()
                        after = batch[-1].id
                        yield batch
            except StoreUnavailable as error:
                if self._calls.closed:
                    raise
                await outage.wait(error)

    async def _states(self, path: str) -> AsyncGenerator[Snapshot | None, None]:
        """What a listener sees of a document, until the listener ends, and what its start may have missed: see
        `_onward`."""
        name = self._database.document(path)
        started = False
        async with listener(self._calls, self._database) as listening:
            await listening.aim(lambda target: target.documents.documents.append(name))
            while True:
                document = (await listening.state()).get(name)
                yield None if document is None else self._database.snapshot(document)
                if not started:
                    started = True
                    yield await self.get(path)

    async def _onward(self, collection: str, after: str, limit: int) -> AsyncGenerator[list[Snapshot], None]:
        """Pages of history, then what a listener sees, and pages of what it skipped, until it has seen nothing for a
        while.

        The emulator never tells a listener of what is committed between its first look and its start: so the first
        state is followed by a look at the pages, and a listener is aimed once.
        """
        while page := await self._page(collection, after, limit):
            after = page[-1].id
            yield page
        async with listener(self._calls, self._database) as listening:
            await listening.aim(partial(newest_target, self._database, collection, after, LISTENED))
            started = False
            while True:
                try:
                    async with asyncio.timeout(QUIET_SECONDS):
                        shown = await listening.state()
                except TimeoutError:
                    return
                if not started or self._skipped(shown, collection, after):
                    started = True
                    while page := await self._page(collection, after, limit):
                        after = page[-1].id
                        yield page
                for batch in self._batches(shown, collection, after, limit):
                    after = batch[-1].id
                    yield batch

    def _skipped(self, shown: Mapping[str, Message], collection: str, after: str) -> bool:
        """Whether there may be documents after the last one that was seen and before those shown."""
        return len(shown) == LISTENED and min(shown) > self._database.document(f"{collection}/{after}")

    def _batches(self, shown: Mapping[str, Message], collection: str, after: str, limit: int) -> list[list[Snapshot]]:
        """What is new of the documents shown."""
        anchor = self._database.document(f"{collection}/{after}")
        names = sorted(name for name in shown if name > anchor)
        new = [self._database.snapshot(shown[name]) for name in names]
        return [new[start : start + limit] for start in range(0, len(new), limit)]

    async def _page(self, collection: str, after: str, limit: int) -> list[Snapshot]:
        request = query_request(self._database, Query(collection, after=after, limit=limit))
        found = await self._calls.query(request, most_bytes=MAX_PAGE_BYTES)
        return [self._database.snapshot(document) for document in found]

    async def _try(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """One run of a transaction. Raises Stale when it has to run again."""
        transaction = OptimisticTransaction(self.get, self._dialect)
        try:
            result = await work(transaction)
        except (StoreUnavailable, Stale):
            raise
        except Exception:
            await self._confirm(transaction.reads)  # what it saw may never have been there at one time
            raise
        if transaction.changes:
            await self._commit_transaction(transaction.changes, transaction.reads)
        else:
            await self._confirm(transaction.reads)
        return result

    async def _commit_transaction(self, changes: list[Change], reads: Reads) -> None:
        once = any(change.kind == "create" or reads.get(change.path) is not None for change in changes)
        try:
            await self._commit(writes.conditioned(self._database, changes, reads), repeatable=once)
        except Conflict as error:
            raise Stale from error
        except (AlreadyExists, NotFound) as error:
            if not await self._unchanged(reads):
                raise Stale from error
            raise

    async def _confirm(self, reads: Reads) -> None:
        """Raises Stale unless everything read was there at one moment."""
        if len(reads) > 1 and not await self._unchanged(reads):
            raise Stale

    async def _unchanged(self, reads: Reads) -> bool:
        """Whether the documents are still as they were read, looked at in one moment."""
        if not reads:
            return True
        request = ReadRequest(database=self._database.name, documents=map(self._database.document, reads))
        request.new_transaction.read_only.SetInParent()
        now = dict.fromkeys(reads, None) | {
            self._database.path(answer.found.name): version_of(answer.found.update_time)
            for answer in await self._calls.read(request)
            if answer.HasField("found")
        }
        return now == reads

    async def _commit(self, changes: list[Change], *, repeatable: bool) -> str:
        """Returns the version of the last document written."""
        request = writes.commit_request(self._database, changes)
        response = await self._calls.commit(request, repeatable=repeatable)
        return version_of(response.write_results[-1].update_time)


class Outage:
    """How long a listener waits before it tries again."""

    def __init__(self) -> None:
        self._wait = FIRST_WAIT

    def over(self) -> None:
        """The store answers."""
        self._wait = FIRST_WAIT

    async def wait(self, error: StoreUnavailable) -> None:
        """Longer each time."""
        logger.warning("a listener starts again in about %.1f s: %s", self._wait, error)
        await asyncio.sleep(random.uniform(self._wait / 2, self._wait))  # noqa: S311
        self._wait = min(2 * self._wait, LONGEST_WAIT)
