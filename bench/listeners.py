"""From committing a chunk to a listener that shows it, on the Firestore emulator."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from bench.bare import LISTENED, BareStore, bare_store
from bench.emulators import Emulators, beside
from bench.report import OURS, RAW, Figure, latencies
from infra.adapters.firestore import FirestoreStore, firestore_store
from schemas.documents import INDEXES, Chunk, chunk_path, chunks_of
from schemas.ports import Store

OUTPUT = b"x" * 100
PAUSES = (0.005, 0.03)  # seconds
PATIENCE = 10.0


def chunk(offset: int, data: bytes) -> dict[str, Any]:
    """The fields of a chunk document."""
    now = datetime.now(UTC)
    return Chunk(offset=offset, data=data, at=now, expire_at=now).fields()


@asynccontextmanager
async def follower(store: Store, collection: str) -> AsyncIterator[asyncio.Queue[Any]]:
    """A queue of what is new in a collection."""
    shown: asyncio.Queue[Any] = asyncio.Queue()

    async def follow() -> None:
        async for batch in store.follow(collection):
            for snapshot in batch:
                shown.put_nowait(snapshot)

    async with beside(follow()):
        yield shown


def measure(emulators: Emulators, *, count: int) -> Iterator[Figure]:
    """Chunk by chunk, by our adapter and by Google's client in turns."""
    shown, committed = emulators.run(_measure(emulators, count))
    yield from latencies("commit to listener", shown)
    yield from latencies("commit", committed)


Seconds = dict[str, list[float]]


async def _measure(emulators: Emulators, count: int) -> tuple[Seconds, Seconds]:
    project, chance = emulators.project(), random.Random(4)
    shown: Seconds = {OURS: [], RAW: []}
    committed: Seconds = {OURS: [], RAW: []}
    async with AsyncExitStack() as held:
        ours = await held.enter_async_context(firestore_store(project, indexes=INDEXES, emulator=emulators.firestore))
        bare = await held.enter_async_context(bare_store(emulators.firestore, project))
        news = await held.enter_async_context(follower(ours, chunks_of("sessions/ours")))
        await _warm_up(ours, bare, news)
        for first in range(1, count + 1, LISTENED):
            async with bare.listen(chunks_of(f"sessions/bare{first}")) as bare_news:
                for number in range(first, first + LISTENED):
                    await asyncio.sleep(chance.uniform(*PAUSES))
                    took = await _timed(ours, chunk_path("sessions/ours", number), news)
                    _note(OURS, took, committed, shown)
                    await asyncio.sleep(chance.uniform(*PAUSES))
                    took = await _timed(bare, chunk_path(f"sessions/bare{first}", number), bare_news)
                    _note(RAW, took, committed, shown)
    return shown, committed


async def _warm_up(ours: FirestoreStore, bare: BareStore, news: asyncio.Queue[Any]) -> None:
    await _timed(ours, chunk_path("sessions/ours", 0), news)
    await bare.create(chunk_path("sessions/other", 0), chunk(0, OUTPUT))


async def _timed(store: FirestoreStore | BareStore, path: str, news: asyncio.Queue[Any]) -> tuple[float, float]:
    """The seconds until the commit has returned, and until the document is shown."""
    data = chunk(0, OUTPUT)
    began = time.perf_counter()
    showing = asyncio.create_task(_shown(news))
    await store.create(path, data)
    committed = time.perf_counter() - began
    return committed, await showing - began


async def _shown(news: asyncio.Queue[Any]) -> float:
    async with asyncio.timeout(PATIENCE):
        await news.get()
    return time.perf_counter()


def _note(name: str, took: tuple[float, float], committed: Seconds, shown: Seconds) -> None:
    committed[name].append(took[0])
    shown[name].append(took[1])
