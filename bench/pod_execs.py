"""What an exec costs, and what ours adds to it: attaching, echo and floods, in one pod and in turns.

The pod is a session's own. Beside the session's agent a second one runs in it, to which this process attaches as a
worker does, so that the way from the agent to the worker is measured without the functions, the bus and the store.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import consumers.agent.agent as wire
from bench.flood import expected, flood
from bench.floors import KEY
from bench.pigeon import ROOM, Session, Stack
from bench.pods import Pods, node_processes
from bench.processes import Meter, pod_cpu_seconds
from bench.report import BARE_EXEC, OURS, PTY, Figure, latencies, median
from bench.terminals import calm, until
from consumers.agent.client import AgentConnection, AgentControl, attach, connect, open_shell
from infra.adapters.kube_exec import ExecStream
from infra.adapters.kube_helper import helper
from infra.adapters.kube_pod import AGENT, PYTHON
from schemas.errors import AgentUnreachable
from schemas.limits import KIB
from tests.cluster.cluster import processes

KUBECTL = "kubectl exec -i"
WHOLE, REQUEST = "whole way", "request"
LINE = 50  # keys before the line is emptied: a shell redraws a long one slower
PAUSES = (0.05, 0.11)  # seconds between two keys: 150 words a minute
READ_BYTES = ACK_BYTES = 256 * KIB
SOCKET = "@pigeon-bench"
ON_A_PTY = """
import os, pty
pid, fd = pty.fork()
if not pid:
    os.execvp("seq", ["seq", "1", "{last}"])
try:
    while data := os.read(fd, 65536):
        while data:
            data = data[os.write(1, data):]
except OSError:
    pass
"""

Work = Callable[[], Awaitable[float]]  # returns when it was done, by time.perf_counter()
Seconds = dict[str, list[float]]


async def timed(subjects: Mapping[str, Work], count: int, pauses: tuple[float, float] = PAUSES) -> Seconds:
    """The seconds that each takes, in turns."""
    chance = random.Random(7)
    seconds: Seconds = {name: [] for name in subjects}
    for _ in range(count):
        for name, work in subjects.items():
            await asyncio.sleep(chance.uniform(*pauses) / len(subjects))
            began = time.perf_counter()
            seconds[name].append(await work() - began)
    return seconds


class Attached:
    """An agent's stream and its control, over execs: a worker's side."""

    def __init__(self, stream: AgentConnection, control: AgentControl) -> None:
        self._stream = stream
        self._control = control
        self._numbers = itertools.count(1)
        self._acked = 0
        self._printed: asyncio.Queue[bytes] = asyncio.Queue()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        """Read on, also while nobody looks: the agent drops who does not answer. As a worker does, acknowledge a chunk
        and not every frame. b"" says that a command has finished."""
        try:
            while True:
                kind, argument, payload = await self._stream.receive()
                if kind in (wire.OUT, wire.ECHO):
                    self._printed.put_nowait(payload)
                    if argument + len(payload) - self._acked >= ACK_BYTES:
                        self._acked = argument + len(payload)
                        await self._stream.send(wire.ACK, self._acked)
                elif kind == wire.MARK:
                    await self._stream.send(wire.ACKMARK, argument)
                    if json.loads(payload)["kind"] == "finished":
                        self._printed.put_nowait(b"")
        except AgentUnreachable as error:
            sys.exit(f"the attachment was lost: {error}")

    async def output(self) -> bytes:
        """The next output; b"" once a command has finished."""
        return await self._printed.get()

    async def close(self) -> None:
        """Detach."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        await self._control.close()
        await self._stream.close()

    async def echo(self) -> float:
        """Type a key and see it; the answer to the request is no part of it."""
        typing = asyncio.create_task(self._control.input(str(time.time_ns()), b"z"))
        while b"z" not in await self.output():
            pass
        seen = time.perf_counter()
        await typing
        return seen

    async def request(self) -> float:
        """Ask and be answered."""
        await self._control.request("status")
        return time.perf_counter()

    async def clear(self) -> None:
        """Empty the line and await its echo."""
        await self._control.input(str(time.time_ns()), b"\x15")
        await asyncio.sleep(0.2)

    async def run(self, command: str) -> bytes:
        """What a command prints."""
        number = next(self._numbers)
        request = {"number": number, "commandId": str(number), "text": command, "timeoutSeconds": 600}
        await self._control.request("run", **request)
        parts = []
        while data := await self.output():
            parts.append(data)
        return b"".join(parts)


@asynccontextmanager
async def attached(pods: Pods, pod: str, socket: str = SOCKET) -> AsyncIterator[Attached]:
    """Attach to the agent that listens there, over two execs."""
    words = [*helper()[:-1], socket]
    stream = await connect(await pods.api.execute(pod, words))
    await open_shell(stream, KEY.hex(), rows=24, cols=80, outputBytes=ROOM["output_bytes"])
    await attach(stream, KEY.hex(), epoch=1, offset=0)
    control = AgentControl(await connect(await pods.api.execute(pod, words)))
    await control.start(KEY.hex())
    session = Attached(stream, control)
    try:
        yield session
    finally:
        await session.close()


@asynccontextmanager
async def second_agent(pods: Pods, pod: str) -> AsyncIterator[None]:
    """One beside the pod's own, ended with the context."""
    words = ("--socket", SOCKET, "--workspace", "/tmp/bench", "--run-dir", "/tmp/bench-run")
    start = f"mkdir /tmp/bench && exec {PYTHON} -I -S {AGENT} serve {' '.join(words)}"
    stream = await pods.api.execute(pod, ["sh", "-c", start])
    yield
    await stream.close()


class Kubectl:
    """`kubectl exec -i POD -- PROGRAM` with pipes."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._in, self._out = process, process.stdin, process.stdout

    @classmethod
    async def start(cls, pods: Pods, pod: str, *program: str) -> Kubectl:
        """Start it."""
        command = pods.kubectl("exec", "-i", pod, "--", *program)
        return cls(await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE))

    async def echo(self) -> float:
        """Write a byte and read it."""
        self._in.write(b"z")
        assert await self._out.readexactly(1) == b"z"
        return time.perf_counter()

    async def output(self) -> bytes:
        """All that it prints."""
        parts = []
        while data := await self._out.read(READ_BYTES):
            parts.append(data)
        await self.close()
        return b"".join(parts)

    async def close(self) -> None:
        """End it."""
        self._in.close()
        await self._process.wait()


async def _bare_echo(stream: ExecStream) -> float:
    await stream.write(b"z")
    assert await stream.read(READ_BYTES) == b"z"
    return time.perf_counter()


async def _bare_output(pods: Pods, pod: str, *program: str) -> bytes:
    stream = await pods.api.execute(pod, program)
    parts = []
    while data := await stream.read(READ_BYTES):
        parts.append(data)
    assert stream.exit is not None, "the exec was cut"
    await stream.close()
    return b"".join(parts)


def measure_echo(pods: Pods, stack: Stack, *, attaches: int, keys: int) -> Iterator[Figure]:
    """Attaching and typing."""
    with _session(stack) as session:
        yield from pods.run(_measure_echo(pods, session, attaches, keys))


@contextmanager
def _session(stack: Stack) -> Iterator[Session]:
    session = Session(stack)
    session.start()
    calm(session)
    yield session
    session.close()


async def _measure_echo(pods: Pods, session: Session, attaches: int, keys: int) -> list[Figure]:
    pod = (await pods.of(session.id)).name
    async with AsyncExitStack() as held:
        await held.enter_async_context(second_agent(pods, pod))
        agent = await held.enter_async_context(attached(pods, pod))
        kubectl = await Kubectl.start(pods, pod, "cat")
        bare = await pods.api.execute(pod, ["cat"])
        held.push_async_callback(kubectl.close)
        held.push_async_callback(bare.close)
        execs: dict[str, Work] = {
            OURS: lambda: _hello(pods, pod),
            KUBECTL: lambda: _done(_kubectl_output(pods, pod, "true")),
            BARE_EXEC: lambda: _done(_bare_output(pods, pod, "true")),
        }
        echoes: dict[str, Work] = {
            WHOLE: lambda: asyncio.to_thread(_whole_echo, session),
            OURS: agent.echo,
            REQUEST: agent.request,
            KUBECTL: kubectl.echo,
            BARE_EXEC: lambda: _bare_echo(bare),
        }
        attaching = await timed(execs, attaches)
        echo: Seconds = {name: [] for name in echoes}
        for _ in range(0, keys, LINE):
            await agent.clear()
            await asyncio.to_thread(calm, session)
            for name, seconds in (await timed(echoes, min(keys, LINE))).items():
                echo[name] += seconds
    rivals = {name: echo[name] for name in (KUBECTL, BARE_EXEC)}
    return [
        *latencies("exec, to the agent's HELLO (others: to the end of `true`)", attaching),
        *latencies("key echo, agent over exec (others: `cat`)", {OURS: echo[OURS], **rivals}),
        *latencies("request to the agent over exec", {OURS: echo[REQUEST], **rivals}),
        *latencies("key echo, whole way", {OURS: echo[WHOLE], **rivals}),
    ]


async def _hello(pods: Pods, pod: str) -> float:
    connection = await connect(await pods.api.execute(pod, [*helper()[:-1], SOCKET]))
    greeted = time.perf_counter()
    await connection.close()
    return greeted


async def _done(work: Awaitable[Any]) -> float:
    await work
    return time.perf_counter()


async def _kubectl_output(pods: Pods, pod: str, *program: str) -> bytes:
    return await (await Kubectl.start(pods, pod, *program)).output()


def _whole_echo(session: Session) -> float:
    session.type(b"z")
    until(session, b"z")
    seen = time.perf_counter()
    session.settle()
    return seen


def measure_floods(pods: Pods, stack: Stack, size: str, *, last: int, rounds: int) -> Iterator[Figure]:
    """`seq` by each way, compared byte for byte, and whose CPU it takes."""
    with _session(stack) as session:
        sandbox = pods.run(pods.of(session.id))
        costs = Costs({"this process": [os.getpid()], "the stack": [stack.pid]}, processes(sandbox.uid))
        speeds = pods.run(_measure_floods(pods, session, sandbox.name, costs, last, rounds))
    rivals = {name: median(speeds[name]) for name in (KUBECTL, BARE_EXEC, PTY)}
    for title, name in (("agent over exec", OURS), ("whole way", WHOLE)):
        ours = {OURS: median(speeds[name]), **rivals}
        yield Figure(f"seq 1 {last}, {title}, {size} pod", "MB/s", ours, more_is_better=True)
        yield from costs.figures({OURS: name, **{rival: rival for rival in rivals}})


async def _measure_floods(
    pods: Pods, session: Session, pod: str, costs: Costs, last: int, rounds: int
) -> dict[str, list[float]]:
    wanted = expected(last)
    plain = wanted.replace(b"\r", b"")
    async with AsyncExitStack() as held:
        await held.enter_async_context(second_agent(pods, pod))
        agent = await held.enter_async_context(attached(pods, pod))
        seq = ("seq", "1", str(last))
        ways: dict[str, tuple[bytes, Callable[[], Awaitable[bytes]]]] = {
            WHOLE: (wanted, lambda: asyncio.to_thread(lambda: flood(session, last)[2])),
            OURS: (wanted, lambda: agent.run(" ".join(seq))),
            KUBECTL: (plain, lambda: _kubectl_output(pods, pod, *seq)),
            BARE_EXEC: (plain, lambda: _bare_output(pods, pod, *seq)),
            PTY: (wanted, lambda: _bare_output(pods, pod, PYTHON, "-c", ON_A_PTY.format(last=last))),
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (text, work) in ways.items():
                with costs.of(name, len(text) / 1e6):
                    began = time.perf_counter()
                    output = await work()
                    speeds[name].append(len(text) / 1e6 / (time.perf_counter() - began))
                assert text in output, f"{name} printed something else than seq did"
    return speeds


class Costs:
    """What each way of a flood costs whom, in seconds of CPU for a megabyte. Empty for a node that is elsewhere."""

    def __init__(self, ours: Mapping[str, list[int]], pod: list[int]) -> None:
        self._groups = {**node_processes(), **ours}
        self._pod = pod[:1]  # one of its processes
        self._spent: dict[str, dict[str, list[float]]] = {}

    @contextmanager
    def of(self, way: str, megabytes: float) -> Iterator[None]:
        """What is spent while the context lasts."""
        meter, before = Meter(self._groups), sum(map(pod_cpu_seconds, self._pod))
        yield
        inside = {"the pod": sum(map(pod_cpu_seconds, self._pod)) - before} if self._pod else {}
        for who, seconds in (meter.seconds() | inside).items():
            self._spent.setdefault(who, {}).setdefault(way, []).append(seconds / megabytes)

    def figures(self, ways: Mapping[str, str]) -> Iterator[Figure]:
        """Milliseconds for a megabyte, a line for each who."""
        for who, spent in self._spent.items():
            values = {column: 1e3 * median(spent[way]) for column, way in ways.items()}
            yield Figure(f"- CPU of {who}", "ms/MB", values)
