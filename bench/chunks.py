"""How many chunks, and how much of them, one process commits to the Firestore emulator: one session, and many."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack

from bench.bare import BareStore, bare_store
from bench.emulators import Emulators
from bench.listeners import chunk
from bench.report import OURS, RAW, Figure, median
from infra.adapters.firestore import FirestoreStore, firestore_store
from schemas.documents import INDEXES, chunk_path
from schemas.limits import MAX_CHUNK_BYTES

MANY = 20
SMALL = 100  # bytes of a chunk
FULL_CHUNKS = 40  # in a round of full ones, of all sessions together
WORDS = {1: "one session", MANY: "twenty sessions at once"}

Target = FirestoreStore | BareStore


def measure(emulators: Emulators, *, rounds: int) -> Iterator[Figure]:
    """Rounds by our adapter and by AsyncClient's create() in turns; each session has one commit in flight."""
    for sessions in WORDS:
        yield from _small(emulators, sessions, rounds)
    for sessions in WORDS:
        yield from _full(emulators, sessions, rounds)


def _small(emulators: Emulators, sessions: int, rounds: int) -> Iterator[Figure]:
    per_session = (600 if sessions > 1 else 300) // sessions
    found = emulators.run(_rounds(emulators, rounds, sessions, per_session, b"z" * SMALL))
    count = sessions * per_session
    speed = {name: count / median(each[0] for each in took) for name, took in found.items()}
    cost = {name: 1e3 * median(each[1] for each in took) / count for name, took in found.items()}
    yield Figure(f"small chunks, {WORDS[sessions]}", "commits/s", speed, more_is_better=True)
    yield Figure("- client's CPU for one", "ms", cost)


def _full(emulators: Emulators, sessions: int, rounds: int) -> Iterator[Figure]:
    per_session = FULL_CHUNKS // sessions
    found = emulators.run(_rounds(emulators, rounds, sessions, per_session, os.urandom(MAX_CHUNK_BYTES)))
    size = sessions * per_session * MAX_CHUNK_BYTES / 1e6
    speed = {name: size / median(each[0] for each in took) for name, took in found.items()}
    cost = {name: 1e3 * median(each[1] for each in took) / size for name, took in found.items()}
    yield Figure(f"full chunks, {WORDS[sessions]}", "MB/s", speed, more_is_better=True)
    yield Figure("- client's CPU for them", "ms/MB", cost)


Took = tuple[float, float]  # seconds, CPU seconds of this process


async def _rounds(
    emulators: Emulators, rounds: int, sessions: int, per_session: int, data: bytes
) -> dict[str, Sequence[Took]]:
    project, numbers = emulators.project(), itertools.count()
    async with AsyncExitStack() as held:
        ours = await held.enter_async_context(firestore_store(project, indexes=INDEXES, emulator=emulators.firestore))
        bare = await held.enter_async_context(bare_store(emulators.firestore, project))
        targets: dict[str, Target] = {OURS: ours, RAW: bare}
        for target in targets.values():
            await _round(target, next(numbers), 1, 3, data)
        took: dict[str, list[Took]] = {name: [] for name in targets}
        for _ in range(rounds):
            for name, target in targets.items():
                took[name].append(await _round(target, next(numbers), sessions, per_session, data))
            await asyncio.to_thread(emulators.forget, project)
    return dict(took)


async def _round(target: Target, number: int, sessions: int, per_session: int, data: bytes) -> Took:
    began, used = time.perf_counter(), time.process_time()
    owners = (f"sessions/r{number}s{session}" for session in range(sessions))
    await asyncio.gather(*(_session(target, owner, per_session, data) for owner in owners))
    return time.perf_counter() - began, time.process_time() - used


async def _session(target: Target, owner: str, count: int, data: bytes) -> None:
    for number in range(count):
        offset = number * len(data)
        await target.create(chunk_path(owner, offset), chunk(offset, data))
