"""From asking for a session to its shell being ready, and what a session costs that nobody uses."""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench.pigeon import Session, Stack
from bench.processes import family, memory_bytes, program
from bench.report import OURS, Figure, latencies, median
from bench.terminals import PROMPTS

SETTLE_SECONDS = 1.0  # until a fresh shell has read its files and everything is at rest


def measure(warm: Stack, cold: Stack, *, count: int) -> Iterator[Figure]:
    """Sessions one by one, from a stack with a warm sandbox and from one without, in turns."""
    ready: dict[str, list[float]] = {"pool": [], "cold": []}
    prompted: dict[str, list[float]] = {"pool": [], "cold": []}
    for _ in range(count):
        for kind, stack in (("pool", warm), ("cold", cold)):
            if stack is warm:
                stack.await_warm()
            for figures, seconds in zip((ready, prompted), _start(stack), strict=True):
                figures[kind].append(seconds)
    for kind, words in (("pool", "from the pool"), ("cold", "cold")):
        yield from latencies(f"session start {words}, to ready", {OURS: ready[kind]})
        yield from latencies(f"session start {words}, to the prompt", {OURS: prompted[kind]})[:1]


def _start(stack: Stack) -> tuple[float, float]:
    session = Session(stack)
    began = time.perf_counter()
    session.start()
    ready = time.perf_counter() - began
    output = b""
    while not any(prompt in output for prompt in PROMPTS):
        output += session.receive()
    prompted = time.perf_counter() - began
    session.close()
    return ready, prompted


def measure_memory(stack: Stack, *, count: int) -> Iterator[Figure]:
    """What each of some idle sessions holds: its sandbox's processes, and what the server has grown by."""
    server = [stack.pid]
    before = memory_bytes(server)
    sessions = [Session(stack) for _ in range(count)]
    for session in sessions:
        session.start()
    time.sleep(SETTLE_SECONDS)
    grown = (memory_bytes(server) - before) / count
    sandboxes = [family(stack.roots_of(session.id)) for session in sessions]
    whole = median(memory_bytes(pids) for pids in sandboxes)
    yield Figure("memory of an idle session's sandbox", "MB", {OURS: whole / 1e6})
    for name in dict.fromkeys(map(program, sandboxes[0])):
        share = median(memory_bytes(pid for pid in pids if program(pid) == name) for pids in sandboxes)
        yield Figure(f"- of which {name}", "MB", {OURS: share / 1e6})
    yield Figure("server's growth with an idle session and its reader", "MB", {OURS: grown / 1e6})
    for session in sessions:
        session.close()
