"""Many attached sessions on one worker, through a real API server and kubelet.

One node cannot run two hundred pods. What a worker has of a session is its attachment and its control connection, so
a few pods run many agents each, and this process attaches to all of them as a worker does: two execs a session, with
the agent's frames and keepalives on them. Bus, store and functions have no part in it.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import uuid4

from bench.pod_execs import Attached, attached
from bench.pods import Pods, node_processes, spec
from bench.processes import Meter, memory_bytes
from bench.report import OURS, Figure, latencies
from infra.adapters.kube_pod import AGENT, PYTHON, pod

AGENTS = 40  # in a pod: with a shell and two helpers each, well below a kubelet's limit of 256 processes
ATTACHING = 6  # at once
KEY_SECONDS = 5.0  # from key to key in one session, on average
SETTLE_SECONDS = 3.0
NAME = "@crowd-"
START = f"""
import importlib.util, os
spec = importlib.util.spec_from_file_location("agent", "{AGENT}/__main__.py")
agent = importlib.util.module_from_spec(spec)
spec.loader.exec_module(agent)
for number in range({{count}}):
    workspace, run = "/tmp/w%d" % number, "/tmp/r%d" % number
    os.mkdir(workspace)
    if not os.fork():
        os.setsid()
        for fd in range(3):
            os.dup2(os.open("/dev/null", os.O_RDWR), fd)
        words = ["--socket", "{NAME}%d" % number, "--workspace", workspace, "--run-dir", run]
        os._exit(agent.main(["serve", *words]))
print("started")
"""


def measure(pods: Pods, *, sessions: int, seconds: float) -> Iterator[Figure]:
    """Attach to that many, leave them alone for a while, then type slowly in all of them."""
    yield from pods.run(_measure(pods, sessions, seconds))


async def _measure(pods: Pods, sessions: int, seconds: float) -> list[Figure]:
    await asyncio.to_thread(pods.cluster.kubectl, "delete", "limitrange", "--all")
    async with AsyncExitStack() as held:
        places: list[tuple[str, str]] = []
        for first in range(0, sessions, AGENTS):
            count = min(AGENTS, sessions - first)
            name = await held.enter_async_context(_crowded(pods, count))
            places += [(name, f"{NAME}{number}") for number in range(count)]
        me = [os.getpid()]
        before, began = memory_bytes(me), time.perf_counter()
        crowd = await _attach(pods, places, held)
        took = time.perf_counter() - began
        await asyncio.sleep(SETTLE_SECONDS)
        grown = memory_bytes(me) - before
        idle = await _spent(asyncio.sleep(seconds))
        echoes: list[float] = []
        typing = await _spent(_type(crowd, seconds, echoes))
        await asyncio.gather(*(session.close() for session in crowd))  # all at once; the contexts would one by one
    title = f"{sessions} sessions on a worker"
    return [
        Figure(f"{title}, until all are attached", "s", {OURS: took}),
        Figure("- worker's memory for each", "KB", {OURS: grown / sessions / 1e3}),
        *(Figure(f"- nobody types: CPU of {who}", "% of a core", {OURS: 100 * share}) for who, share in idle.items()),
        *(
            Figure(f"- {sessions / KEY_SECONDS:.0f} keys/s: CPU of {who}", "% of a core", {OURS: 100 * share})
            for who, share in typing.items()
        ),
        *latencies(f"- key echo at {sessions / KEY_SECONDS:.0f} keys/s, agent over exec", {OURS: echoes}),
    ]


@asynccontextmanager
async def _crowded(pods: Pods, count: int) -> AsyncIterator[str]:
    """A pod with that many agents, and as much of the node as it can get."""
    made = pod(spec(name := f"crowd-{uuid4().hex[:8]}"), pods.settings)
    made["spec"]["containers"][0]["resources"] = {"requests": {"cpu": "10m", "memory": "64Mi"}}
    raw = await pods.api.create(made)
    try:
        await pods.sandboxes.running(name, raw["metadata"]["uid"])
        starter = await pods.api.execute(name, [PYTHON, "-I", "-S", "-c", START.format(count=count)])
        assert await starter.speaks(), starter.why()
        await starter.close()
        yield name
    finally:
        await pods.sandboxes.delete(name, raw["metadata"]["uid"])


async def _attach(pods: Pods, places: Sequence[tuple[str, str]], held: AsyncExitStack) -> list[Attached]:
    turns = asyncio.Semaphore(ATTACHING)

    async def one(name: str, socket: str) -> Attached:
        async with turns:
            return await held.enter_async_context(attached(pods, name, socket))

    return await asyncio.gather(*(one(*place) for place in places))


async def _spent(work: Awaitable[None]) -> dict[str, float]:
    """The share of a core that each has used while the work was done."""
    meter, began = Meter({"the worker": [os.getpid()], **node_processes()}), time.perf_counter()
    await work
    took = time.perf_counter() - began
    return {who: spent / took for who, spent in meter.seconds().items()}


async def _type(crowd: Sequence[Attached], seconds: float, echoes: list[float]) -> None:
    """A key in each now and then, each at its own time."""
    until = time.perf_counter() + seconds
    chance = random.Random(11)

    async def one(session: Attached) -> None:
        await asyncio.sleep(chance.uniform(0, KEY_SECONDS))
        while time.perf_counter() < until:
            began = time.perf_counter()
            echoes.append(await session.echo() - began)
            await asyncio.sleep(chance.uniform(0.5, 1.5) * KEY_SECONDS)

    await asyncio.gather(*map(one, crowd))
