"""The whole way of a command on emulators, from its POST to a listener that shows its output; and floods."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any

from bench.bare import LISTENED, BareBus, BareStore, bare_bus, bare_store
from bench.emulators import Emulators
from bench.flood import expected, flood
from bench.listeners import OUTPUT, chunk, follower
from bench.pigeon import Session, Stack
from bench.processes import cpu_seconds
from bench.report import EMBEDDED, OURS, RAW, Figure, latencies, median
from bench.terminals import calm, until
from infra.adapters.firestore import firestore_store
from schemas.documents import INDEXES, chunk_path, chunks_of
from schemas.ports import Snapshot

PAUSES = (0.02, 0.12)  # seconds: more than the emulator's tick of 50 ms apart, so that nothing locks to it
OPENING_SECONDS = 0.02  # until a pull has reached the emulator
PATIENCE = 30.0
MANY = 20
ANSWER = 1_000_003


def measure(emulators: Emulators, project: str, stack: Stack, embedded: Stack, *, count: int) -> Iterator[Figure]:
    """Command by command in turns: on the emulators as its stream and as a listener show it, on the embedded profile,
    and the four calls that the longer way cannot do without."""
    session, other = _started(stack), _started(embedded)
    streamed, listened = emulators.run(_commands(emulators, project, session, other, count))
    yield from latencies("command on emulators, to the stream", streamed)
    yield from latencies("command on emulators, to a listener", listened)
    session.close()
    other.close()


def _started(stack: Stack) -> Session:
    session = Session(stack)
    session.start()
    calm(session)
    return session


Seconds = dict[str, list[float]]


async def _commands(
    emulators: Emulators, project: str, session: Session, other: Session, count: int
) -> tuple[Seconds, Seconds]:
    streamed: Seconds = {OURS: [], RAW: [], EMBEDDED: []}
    listened: Seconds = {OURS: [], RAW: streamed[RAW]}
    chance = random.Random(5)
    async with AsyncExitStack() as held:
        store = await held.enter_async_context(firestore_store(project, indexes=INDEXES, emulator=emulators.firestore))
        news = await held.enter_async_context(follower(store, chunks_of(f"sessions/{session.id}")))
        floor = emulators.project()
        bus = await held.enter_async_context(bare_bus(emulators.pubsub, floor))
        bare = await held.enter_async_context(bare_store(emulators.firestore, floor))
        for first in range(0, count, LISTENED):
            async with bare.listen(chunks_of(f"sessions/s{first}")) as shown:
                for number in range(first, first + LISTENED):
                    turns: list[tuple[list[float], Callable[[], Any]]] = [
                        (streamed[OURS], lambda n=number: asyncio.to_thread(_streamed, session, 2 * n)),  # type: ignore[misc]
                        (listened[OURS], lambda n=number: _listened(session, 2 * n + 1, news)),  # type: ignore[misc]
                        (streamed[EMBEDDED], lambda n=number: asyncio.to_thread(_streamed, other, n)),  # type: ignore[misc]
                        (streamed[RAW], lambda n=number, s=first: _bare(bus, bare, f"sessions/s{s}", n, shown)),  # type: ignore[misc]
                    ]
                    for seconds, turn in turns:
                        await asyncio.sleep(chance.uniform(*PAUSES))
                        seconds.append(await turn())
    return streamed, listened


def _submit(session: Session, number: int) -> tuple[float, bytes]:
    """Post a command; when, and what it will print."""
    session.settle()
    began = time.perf_counter()
    session.run(f"echo $(({ANSWER}*{number}+7))")
    return began, b"%d\r\n" % (ANSWER * number + 7)


def _streamed(session: Session, number: int) -> float:
    began, answer = _submit(session, number)
    until(session, answer)
    return time.perf_counter() - began


async def _listened(session: Session, number: int, news: asyncio.Queue[Snapshot]) -> float:
    began, answer = _submit(session, number)
    seen = b""
    async with asyncio.timeout(PATIENCE):
        while answer not in seen:
            seen = seen[-len(answer) :] + (await news.get()).data["data"]
    return time.perf_counter() - began


async def _bare(bus: BareBus, store: BareStore, owner: str, number: int, shown: asyncio.Queue[Any]) -> float:
    """Publish, pull, create, listen. A pull is open before, as a worker's is: an answer to a later one would come at
    once, and not with the emulator's tick."""
    pulling = asyncio.create_task(bus.pull())
    await asyncio.sleep(OPENING_SECONDS)
    began = time.perf_counter()
    await bus.publish(b"%d" % number, "key")
    while not (received := await pulling):
        pulling = asyncio.create_task(bus.pull())
    await store.create(chunk_path(owner, number), chunk(number, OUTPUT))
    await shown.get()
    seconds = time.perf_counter() - began
    await bus.acknowledge(received)
    return seconds


def measure_floods(stack: Stack, embedded: Stack, *, last: int, rounds: int) -> Iterator[Figure]:
    """`seq` in one session and in twenty at once, compared byte for byte, on emulators and on the embedded profile."""
    for count, words in ((1, "one session"), (MANY, "twenty sessions at once")):
        sessions = {OURS: [_started(stack) for _ in range(count)], EMBEDDED: [_started(embedded) for _ in range(count)]}
        servers = {OURS: stack.pid, EMBEDDED: embedded.pid}
        speeds: Seconds = {name: [] for name in sessions}
        costs: Seconds = {name: [] for name in sessions}
        for _ in range(rounds):
            for name, each in sessions.items():
                used = cpu_seconds([servers[name]])
                seconds, size = _flooded(each, last if count == 1 else last // 10)
                speeds[name].append(size / seconds)
                costs[name].append(1e3 * (cpu_seconds([servers[name]]) - used) / size)
        yield _figure(f"seq on emulators, {words}", "MB/s", speeds, more_is_better=True)
        yield _figure("- gateway's and worker's CPU for it", "ms/MB", costs)
        for session in (*sessions[OURS], *sessions[EMBEDDED]):
            session.close()


def _figure(name: str, unit: str, values: Seconds, *, more_is_better: bool = False) -> Figure:
    return Figure(name, unit, {who: median(each) for who, each in values.items()}, more_is_better)


def _flooded(sessions: Sequence[Session], last: int) -> tuple[float, float]:
    """The seconds until every session has its whole output, and the megabytes of all of them."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(sessions)) as pool:
        outputs = list(pool.map(lambda session: flood(session, last)[2], sessions))
    seconds, wanted = time.perf_counter() - began, expected(last)
    assert all(wanted in output for output in outputs), "a session printed something else than seq did"
    return seconds, sum(map(len, outputs)) / 1e6
