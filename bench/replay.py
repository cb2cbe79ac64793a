"""Whether reading on costs more where more has been said before."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator

from bench.flood import flood
from bench.keystrokes import line
from bench.pigeon import Session, Stack
from bench.report import OURS, Figure, median
from bench.terminals import calm

SMALL, LARGE = 1_000_000, 60_000_000  # bytes of transcript
LINES = {SMALL: 100_000, LARGE: 5_000_000}  # of seq, in one flood
BACK = 1_000  # bytes before the end, where reading starts


def measure(stack: Stack, *, count: int, large: int = LARGE) -> Iterator[Figure]:
    """A session at one length, then the same session at the other."""
    session = Session(stack)
    session.start()
    for size in (SMALL, large):
        while session.offset < size:
            flood(session, LINES[SMALL] if size - session.offset < 20_000_000 else LINES[LARGE])
        calm(session)
        yield from _at(stack, session, f"{size // 1_000_000} MB", count)
    session.close()


def _at(stack: Stack, session: Session, label: str, count: int) -> Iterator[Figure]:
    end = session.offset
    places = {"near the end": end - BACK, "in the middle": end // 2, "at the start": 0}
    for place, offset in places.items():
        seconds = median(_first_chunk(stack, session.id, offset) for _ in range(count))
        yield Figure(f"first bytes from {place} of {label}, stream", "ms", {OURS: 1e3 * seconds})
    seconds = median(_poll(stack, session.id, end - BACK) for _ in range(count))
    yield Figure(f"poll from near the end of {label}", "ms", {OURS: 1e3 * seconds})
    yield Figure(f"keystroke echo at {label}, p50", "ms", {OURS: 1e3 * median(line(session))})


def _first_chunk(stack: Stack, session: str, offset: int) -> float:
    events = stack.events()
    began = time.perf_counter()
    events.open(f"/terminal-stream-output/{session}?from={offset}")
    while True:
        name, value = events.next()
        if name == b"message":
            break
    seconds = time.perf_counter() - began
    assert value["offset"] == offset
    assert base64.b64decode(value["data"])
    events.close()
    return seconds


def _poll(stack: Stack, session: str, cursor: int) -> float:
    http = stack.http()
    began = time.perf_counter()
    answer = http.call("POST", "/terminal-get-output", {"sessionId": session, "cursor": cursor, "wait": 5})
    seconds = time.perf_counter() - began
    assert answer["cursor"] > cursor
    http.close()
    return seconds
