"""How fast much output gets through, what that costs, and whether it is all there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from bench.floors import raw_pty
from bench.processes import cpu_seconds, family
from bench.report import PTY, Figure, median
from bench.terminals import Terminal, calm

MARK = b"D1NE\r\n"


def expected(last: int) -> bytes:
    """What `seq 1 LAST` prints on a terminal."""
    return b"".join(b"%d\r\n" % number for number in range(1, last + 1))


def measure(terminals: Sequence[Terminal], *, last: int, rounds: int) -> Iterator[Figure]:
    """`seq 1 LAST` in turns, compared byte for byte."""
    wanted = expected(last)
    names = (PTY, *(terminal.name for terminal in terminals))
    speeds: dict[str, list[float]] = {name: [] for name in names}
    costs: dict[str, list[float]] = {name: [] for name in names}

    def note(name: str, seconds: float, cpu: float) -> None:
        speeds[name].append(len(wanted) / 1e6 / seconds)
        costs[name].append(1e3 * cpu / (len(wanted) / 1e6))

    for _ in range(rounds):
        note(PTY, *raw_pty(last))
        for terminal in terminals:
            seconds, cpu, output = flood(terminal, last)
            assert wanted in output, f"{terminal.name} printed something else than seq did"
            note(terminal.name, seconds, cpu)
    yield Figure(f"seq 1 {last}", "MB/s", {name: median(each) for name, each in speeds.items()}, more_is_better=True)
    yield Figure("server's CPU for it", "ms/MB", {name: median(each) for name, each in costs.items()})


def flood(terminal: Terminal, last: int) -> tuple[float, float, bytes]:
    """Run it once: the seconds, the CPU seconds of everything on the server's side, and what was received."""
    calm(terminal)
    processes = family(terminal.roots())
    used = cpu_seconds(processes)
    parts: list[bytes] = []
    tail = b""
    began = time.perf_counter()
    terminal.run(f"seq 1 {last}; echo D$((1))NE")
    while MARK not in tail:
        part = terminal.receive()
        parts.append(part)
        tail = tail[-len(MARK) :] + part
    seconds = time.perf_counter() - began
    terminal.settle()
    calm(terminal)  # the shell counts its child's CPU before it prompts
    return seconds, cpu_seconds(processes) - used, b"".join(parts)
