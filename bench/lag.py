"""What holds up a worker's event loop, and what its CPU goes to: a storm of commands, and a flood of output."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from bench.counted import Deployment, Place, Session, gateway
from bench.emulators import Emulators
from bench.report import OURS, Figure, percentile
from bench.tally import Tally
from schemas.topics import SUBSCRIPTIONS, TOPICS

SESSIONS = 4  # of a storm
MOST_NAMED = 3  # kinds of callbacks, those that took most
COMMAND = "true"
REPORTING = "main"  # the measuring process's own coroutine


class Sampled:
    """A worker in its process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._cpu = 0.0

    async def look(self) -> dict[str, Any]:
        """What it has seen since the last look; `cpu` in seconds since then."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        seen: dict[str, Any] = json.loads(await self._process.stdout.readline())
        seen["cpu"], self._cpu = seen["cpu"] - self._cpu, seen["cpu"]
        return seen


@asynccontextmanager
async def sampled(place: Place) -> AsyncIterator[Sampled]:
    """Start one; it is at work when the context begins."""
    arguments = [str(place.folder), str(place.python), place.pubsub, place.firestore, place.project]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.sampled", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 30,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        await process.stdout.readline()
        yield Sampled(process)
    finally:
        process.stdin.close()
        await process.wait()


def measure(emulators: Emulators, folder: Path, python: Path, *, commands: int, last: int) -> Iterator[Figure]:
    """A storm of commands in four sessions, then `seq 1 LAST` in one of them, with the gateway in this process."""
    place = Place(folder, python, emulators.pubsub, emulators.firestore, emulators.project())
    storm, flood, megabytes = emulators.run(_measure(place, commands, last))
    yield from _figures(f"a storm of {commands} commands", storm)
    yield Figure("- worker's CPU for a command", "ms", {OURS: 1e3 * storm["cpu"] / commands})
    yield from _figures(f"a flood of {megabytes:.0f} MB", flood)
    yield Figure("- worker's CPU for it", "ms/MB", {OURS: 1e3 * flood["cpu"] / megabytes})


async def _measure(place: Place, commands: int, last: int) -> tuple[dict[str, Any], dict[str, Any], float]:
    async with AsyncExitStack() as held:
        store = await held.enter_async_context(place.store())
        bus = await held.enter_async_context(place.bus())
        await bus.create(TOPICS, SUBSCRIPTIONS)
        worker = await held.enter_async_context(sampled(place))
        client = await held.enter_async_context(gateway(store, bus))
        opened = Deployment(Tally(), client, store)
        sessions = [await held.enter_async_context(opened.session()) for _ in range(SESSIONS)]
        await asyncio.gather(*(session.run(COMMAND) for session in sessions))
        await worker.look()
        await asyncio.gather(*(_storm(session, commands // SESSIONS) for session in sessions))
        storm = await worker.look()
        record = await sessions[0].run(f"seq 1 {last}")
        assert record.start_offset is not None
        assert record.end_offset is not None
        return storm, await worker.look(), (record.end_offset - record.start_offset) / 1e6


async def _storm(session: Session, count: int) -> None:
    """As many as are taken; the last one ends when all have."""
    for _ in range(count - 1):
        await session.deployment.client.execute(session.id, COMMAND)
    await session.run(COMMAND)


def _figures(name: str, seen: dict[str, Any]) -> Iterator[Figure]:
    for label, share in (("p50", 0.5), ("p99", 0.99), ("most", 1.0)):
        yield Figure(f"loop's lag in {name}, {label}", "ms", {OURS: 1e3 * percentile(seen["lags"], share)})
    callbacks: dict[str, list[float]] = seen["callbacks"]
    callbacks.pop(REPORTING, None)
    every = list(itertools.chain.from_iterable(callbacks.values()))
    yield Figure("- CPU of one callback, p99", "ms", {OURS: 1e3 * percentile(every, 0.99)})
    for kind in sorted(callbacks, key=lambda each: -max(callbacks[each]))[:MOST_NAMED]:
        yield Figure(f"- {kind}, at most", "ms", {OURS: 1e3 * max(callbacks[kind])})
    for kind in sorted(callbacks, key=lambda each: -sum(callbacks[each]))[:MOST_NAMED]:
        yield Figure(f"- {kind}, in all", "ms", {OURS: 1e3 * sum(callbacks[kind])})
