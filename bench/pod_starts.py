"""From asking for a pod to a prompt in it, phase by phase, beside a bare pod; and whole sessions, cold and warm."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import consumers.agent.agent as wire
from bench.floors import KEY
from bench.pigeon import Session, Stack
from bench.pods import Pods, spec
from bench.report import BARE_POD, OURS, Figure, latencies, median
from bench.terminals import PROMPTS, until
from consumers.agent.client import AgentConnection, attach, connect, open_shell
from infra.adapters.kube_pod import pod
from schemas.ports import Phase, Sandbox

PATIENCE = 60.0  # seconds for one phase
PHASES = ("accepted", "scheduled", "running", "answering", "ready", "prompt")

Seconds = dict[str, list[float]]


def measure(pods: Pods, cold: Stack, pool: Pods, warm: Stack, *, count: int) -> Iterator[Figure]:
    """A pod by our adapter, a bare one, a session without and one with a warm pod, in turns. `pool` is where the warm
    stack's pods are: the other one's worker would claim them."""
    ours: Seconds = {phase: [] for phase in PHASES}
    bare: Seconds = {phase: [] for phase in PHASES}
    sessions: dict[str, defaultdict[str, list[float]]] = {kind: defaultdict(list) for kind in ("cold", "from the pool")}
    for _ in range(count):
        for figures, work in ((ours, _adapter(pods)), (bare, _bare(pods))):
            for phase, seconds in pods.run(work).items():
                figures[phase].append(seconds)
        for kind, stack in (("cold", cold), ("from the pool", warm)):
            if stack is warm:
                pool.run(_warm(pool))
            for phase, seconds in _session(stack).items():
                sessions[kind][phase].append(seconds)
    for phase in PHASES:
        values = {OURS: ours[phase], BARE_POD: bare[phase]}
        yield Figure(
            f"pod, until {phase}, p50", "ms", {who: 1e3 * median(each) for who, each in values.items() if each}
        )
    for kind, phases in sessions.items():
        for phase, each in phases.items():
            yield from latencies(f"session on a pod, {kind}, {phase}", {OURS: each})


class Phases:
    """When each phase was reached, in seconds from the start."""

    def __init__(self) -> None:
        self.reached: dict[str, float] = {}
        self._began = time.perf_counter()

    def reach(self, phase: str) -> None:
        """Note it the first time."""
        self.reached.setdefault(phase, time.perf_counter() - self._began)

    def see(self, raw: dict[str, Any]) -> None:
        """Take in what the watch says of the pod."""
        if raw["spec"].get("nodeName"):
            self.reach("scheduled")
        if raw["status"].get("phase") == "Running":
            self.reach("running")


async def _adapter(pods: Pods) -> dict[str, float]:
    """As a worker does it: create, running, connect, open, attach, up to the prompt."""
    async with _watched(pods) as begin:
        phases = begin(name := f"start-{uuid4().hex[:8]}")
        sandbox = await pods.sandboxes.create(spec(name))
        phases.reach("accepted")
        try:
            await pods.sandboxes.running(sandbox.name, sandbox.uid)
            connection = await connect(await pods.sandboxes.connect(sandbox.name, sandbox.uid))
            phases.reach("answering")
            await open_shell(connection, KEY.hex(), rows=24, cols=80)
            phases.reach("ready")
            await attach(connection, KEY.hex(), epoch=1, offset=0)
            await _prompt(connection)
            phases.reach("prompt")
            await connection.close()
        finally:
            await pods.sandboxes.delete(sandbox.name, sandbox.uid)
        return phases.reached


async def _prompt(connection: AgentConnection) -> None:
    seen = b""
    while not any(prompt in seen for prompt in PROMPTS):
        kind, _, payload = await connection.receive()
        seen += payload if kind in (wire.OUT, wire.ECHO) else b""


async def _bare(pods: Pods) -> dict[str, float]:
    """The least that the cluster lets be a pod: no agent, no volumes, and the first word of an `echo` in it."""
    made = pod(spec(name := f"bare-{uuid4().hex[:8]}"), pods.settings)
    del made["spec"]["volumes"], made["spec"]["containers"][0]["volumeMounts"]
    made["spec"]["containers"][0]["command"] = ["sleep", "3600"]
    made["spec"]["terminationGracePeriodSeconds"] = 0
    async with _watched(pods) as begin:
        phases = begin(name)
        raw = await pods.api.create(made)
        phases.reach("accepted")
        try:
            await pods.sandboxes.running(name, raw["metadata"]["uid"])
            phases.reach("running")
            stream = await pods.api.execute(name, ["echo", "hello"])
            assert await stream.read(100) == b"hello\n"
            phases.reach("answering")
            await stream.close()
        finally:
            await pods.api.delete(name, raw["metadata"]["uid"], grace_seconds=0)
        return phases.reached


@asynccontextmanager
async def _watched(pods: Pods) -> AsyncIterator[Callable[[str], Phases]]:
    """A watch of our own beside the adapter's, which tells the phases of the pod that is begun."""
    _, version = await pods.api.list()
    watched: dict[str, Phases] = {}

    def begin(name: str) -> Phases:
        return watched.setdefault(name, Phases())

    async with pods.api.watch(version) as events:
        task = asyncio.create_task(_follow(events, watched))
        try:
            yield begin
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _follow(events: AsyncIterator[tuple[str, dict[str, Any]]], watched: dict[str, Phases]) -> None:
    async for _, raw in events:
        if phases := watched.get(raw["metadata"].get("name", "")):
            phases.see(raw)


async def _warm(pods: Pods) -> Sandbox:
    """A pod of the pool once its agent answers."""
    async with asyncio.timeout(PATIENCE):
        for pause in itertools.repeat(0.05):
            for sandbox in await pods.sandboxes.list():
                if sandbox.session is None and sandbox.phase is Phase.RUNNING:
                    await (await pods.sandboxes.connect(sandbox.name, sandbox.uid)).close()
                    return sandbox
            await asyncio.sleep(pause)
    raise AssertionError("unreachable")


def _session(stack: Stack) -> dict[str, float]:
    session = Session(stack)
    began = time.perf_counter()
    session.start()
    reached = {"to ready": time.perf_counter() - began}
    output = b""
    while not any(prompt in output for prompt in PROMPTS):
        output += session.receive()
    reached["to the prompt"] = time.perf_counter() - began
    began = time.perf_counter()
    session.type(b"z")
    until(session, b"z")
    reached["its first key's echo"] = time.perf_counter() - began
    session.close()
    return reached
