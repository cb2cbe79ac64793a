"""From a keystroke to its echo on the reader's connection."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

from bench.report import Figure, latencies
from bench.terminals import Terminal, calm, until

LINE = 50  # keystrokes before the line is emptied: a shell redraws a long one slower
TYPIST_SECONDS = 0.08  # from key to key on one terminal, on average: 150 words a minute


def measure(terminals: Sequence[Terminal], *, count: int) -> Iterator[Figure]:
    """Key by key in turns at a fast typist's pace, then each terminal as fast as its echoes come."""
    names = [terminal.name for terminal in terminals]
    yield from latencies("keystroke echo, typing", dict(zip(names, typed(terminals, count), strict=True)))
    yield from latencies(
        "keystroke echo, faster than typing", dict(zip(names, _flat_out(terminals, count), strict=True))
    )


def typed(terminals: Sequence[Terminal], count: int) -> list[list[float]]:
    """The seconds from key to echo on each terminal, while they are typed on in turns."""
    chance = random.Random(1)
    pause = TYPIST_SECONDS / len(terminals)
    seconds: list[list[float]] = [[] for _ in terminals]
    for number in range(count):
        for terminal, echoes in zip(terminals, seconds, strict=True):
            if number % LINE == 0:
                calm(terminal)
            time.sleep(pause * chance.uniform(0.5, 1.5))
            echoes.append(_echo(terminal))
    return seconds


def _flat_out(terminals: Sequence[Terminal], count: int) -> list[list[float]]:
    """The next key as soon as the last one shows, a line on each terminal in turns."""
    seconds: list[list[float]] = [[] for _ in terminals]
    for _ in range(0, count, LINE):
        for terminal, echoes in zip(terminals, seconds, strict=True):
            calm(terminal)
            echoes += [_echo(terminal) for _ in range(LINE)]
    return seconds


def _echo(terminal: Terminal) -> float:
    began = time.perf_counter()
    terminal.type(b"z")
    until(terminal, b"z")
    seconds = time.perf_counter() - began
    terminal.settle()
    return seconds
