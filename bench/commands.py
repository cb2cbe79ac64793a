"""From submitting a command to the last byte it prints on the reader's connection."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

from bench.report import Figure, latencies
from bench.terminals import Terminal, calm, until

PAUSES = (0.005, 0.03)  # seconds in which the prompt comes back


def measure(terminals: Sequence[Terminal], *, count: int) -> Iterator[Figure]:
    """Command by command in turns."""
    chance = random.Random(2)
    seconds: dict[str, list[float]] = {terminal.name: [] for terminal in terminals}
    for terminal in terminals:
        calm(terminal)
    for number in range(1, count + 1):
        for terminal in terminals:
            time.sleep(chance.uniform(*PAUSES))
            seconds[terminal.name].append(_round_trip(terminal, number))
    yield from latencies("command round trip", seconds)


def _round_trip(terminal: Terminal, number: int) -> float:
    began = time.perf_counter()
    terminal.run(f"echo $((1000003*{number}+7))")
    until(terminal, b"%d\r\n" % (1000003 * number + 7))
    seconds = time.perf_counter() - began
    terminal.settle()
    return seconds
