"""From a keystroke to its echo on the reader's connection."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

from bench.report import Figure, latencies
from bench.terminals import Terminal, calm, until

LINE = 50  # keystrokes before the line is emptied: a shell redraws a long one slower
PAUSES = (0.005, 0.03)  # seconds between two keystrokes; with four terminals taking turns, a fast typist on each


def measure(terminals: Sequence[Terminal], *, count: int) -> Iterator[Figure]:
    """Keystroke by keystroke in turns at a person's pace, then each terminal as fast as its echoes come."""
    yield from latencies("keystroke echo, typing", _in_turns(terminals, count))
    yield from latencies("keystroke echo, back to back", _back_to_back(terminals, count))


def _in_turns(terminals: Sequence[Terminal], count: int) -> dict[str, list[float]]:
    chance = random.Random(1)
    seconds: dict[str, list[float]] = {terminal.name: [] for terminal in terminals}
    for number in range(count):
        for terminal in terminals:
            if number % LINE == 0:
                calm(terminal)
            time.sleep(chance.uniform(*PAUSES))
            seconds[terminal.name].append(_echo(terminal))
    return seconds


def _back_to_back(terminals: Sequence[Terminal], count: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {terminal.name: [] for terminal in terminals}
    for _ in range(0, count, LINE):
        for terminal in terminals:
            seconds[terminal.name] += line(terminal)
    return seconds


def line(terminal: Terminal) -> list[float]:
    """The seconds from key to echo, for one line of keys on one terminal."""
    calm(terminal)
    return [_echo(terminal) for _ in range(LINE)]


def _echo(terminal: Terminal) -> float:
    began = time.perf_counter()
    terminal.type(b"z")
    until(terminal, b"z")
    seconds = time.perf_counter() - began
    terminal.settle()
    return seconds
