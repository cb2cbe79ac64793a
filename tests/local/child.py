"""What the tests run in processes of their own, to kill them: `python -m tests.local.child VERB FILE ARGUMENTS`."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from infra.clock import SystemClock
from infra.local.bus import LocalBus
from infra.local.database import Database
from infra.local.store import LocalStore
from schemas.errors import AlreadyExists, Conflict
from schemas.ids import chunk_id, new_id
from schemas.ports import Delivery, Message, Query, Store, Subscription, Transaction

ORDERED = Subscription("events-worker", "events", ordered=True, ack_deadline=0.5, max_outstanding=4, max_attempts=1_000)
CHUNKS = "sessions/s1/chunks"


def open_store(database: Database) -> LocalStore:
    """The store of every child."""
    return LocalStore(database, indexes={})


def open_bus(database: Database) -> LocalBus:
    """The bus of every child."""
    return LocalBus(database, topics=["events"], subscriptions=[ORDERED], clock=SystemClock())


def chunk_bytes(start: int) -> bytes:
    """What the program prints at this offset: the same in every process, of changing length."""
    return bytes((start + index) % 251 for index in range(1 + start * 7 % 5_000))


async def append_chunks(database: Database, end: str) -> None:
    """Write the transcript up to offset `end` (or beyond), as a tender does, from where it ends now."""
    store = open_store(database)
    last = await store.query(Query(CHUNKS, descending=True, limit=1))
    position = last[0].data["offset"] + len(last[0].data["data"]) if last else 0
    while position < int(end):
        data = chunk_bytes(position)
        with suppress(AlreadyExists):  # another writer was there first, with the same bytes
            await store.create(f"{CHUNKS}/{chunk_id(position)}", {"offset": position, "data": data})
        position += len(data)


async def count_up(database: Database, times: str) -> None:
    """Increment a counter, each time with a receipt in the same transaction."""
    store = open_store(database)

    async def work(transaction: Transaction) -> None:
        counter = await transaction.get("counters/c")
        assert counter is not None
        transaction.update("counters/c", {"count": counter.data["count"] + 1})
        transaction.create(f"receipts/{new_id()}", {"by": os.getpid()})

    for _ in range(int(times)):
        done = False
        while not done:
            with suppress(Conflict):
                await store.transact(work)
                done = True


async def handle_events(database: Database) -> None:
    """Handle what is published, several keys at a time, for ever: each key's numbers have to come in their order."""
    store = open_store(database)
    async with asyncio.TaskGroup() as handlers, open_bus(database).pull(ORDERED) as deliveries:
        async for delivery in deliveries:
            handlers.create_task(_handle(store, delivery))


async def _handle(store: Store, delivery: Delivery) -> None:
    key, number = delivery.message.ordering_key, int(delivery.message.data)

    async def work(transaction: Transaction) -> None:
        seen = await transaction.get(f"keys/{key}")
        last = seen.data["last"] if seen else 0
        if number == last + 1:
            _remember(transaction, f"keys/{key}", number, seen is None)
        elif number > last:
            transaction.create(f"violations/{new_id()}", {"key": key, "number": number, "last": last})

    await store.transact(work)
    await delivery.ack()


def _remember(transaction: Transaction, path: str, number: int, first: bool) -> None:
    if first:
        transaction.create(path, {"last": number})
    else:
        transaction.update(path, {"last": number})


async def publish_events(database: Database, key: str, count: str) -> None:
    """Publish the numbers from 1 under one key."""
    bus = open_bus(database)
    for number in range(1, int(count) + 1):
        await bus.publish("events", Message(str(number).encode(), {}, key))


async def hold_one(database: Database) -> None:
    """Take one message, say so, and hold it for ever."""
    async with open_bus(database).pull(ORDERED) as deliveries:
        delivery = await anext(deliveries)
        print("holding", delivery.message.data.decode(), flush=True)
        await delivery.lost()


async def echo(database: Database) -> None:
    """For every line on stdin, create a document with the time at which that was done."""
    store = open_store(database)
    print("ready", flush=True)
    while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
        await store.create(f"{CHUNKS}/{line}", {"at": time.monotonic()})


VERBS: dict[str, Callable[..., Awaitable[None]]] = {
    function.__name__: function for function in (append_chunks, count_up, handle_events, publish_events, hold_one, echo)
}


async def main(verb: str, path: str, *arguments: str) -> None:
    """Run one verb on the database at `path`."""
    async with Database(Path(path)) as database:
        await VERBS[verb](database, *arguments)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
