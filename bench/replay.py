"""Whether reading on costs more where more has been said before."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping

from bench.flood import flood
from bench.keystrokes import typed
from bench.pigeon import Session, Stack
from bench.report import OURS, Figure, median
from bench.terminals import calm

LENGTHS = (1_000_000, 60_000_000)  # bytes of transcript
FLOODS = ((5_000_000, 44_000_000), (100_000, 700_000))  # how far seq counts, and about how many bytes that is
BACK = 1_000  # bytes before the end, where reading starts


def measure(stack: Stack, *, count: int) -> Iterator[Figure]:
    """A short and a long transcript in turns."""
    sessions = {f"{length // 1_000_000} MB": _session(stack, length) for length in LENGTHS}
    for place, share in (("near the end", None), ("in the middle", 0.5), ("at the start", 0.0)):
        seconds: dict[str, list[float]] = {label: [] for label in sessions}
        for _ in range(count):
            for label, session in sessions.items():
                offset = session.offset - BACK if share is None else int(session.offset * share)
                seconds[label].append(_first_bytes(stack, session.id, offset))
        yield from _figures(f"first bytes of a stream from {place}", seconds)
    polls: dict[str, list[float]] = {label: [] for label in sessions}
    for _ in range(count):
        for label, session in sessions.items():
            polls[label].append(_poll(stack, session.id, session.offset - BACK))
    echoes = dict(zip(sessions, typed(list(sessions.values()), 2 * count), strict=True))
    yield from _figures("poll from near the end", polls)
    yield from _figures("keystroke echo", echoes)
    for session in sessions.values():
        session.close()


def _session(stack: Stack, length: int) -> Session:
    """A session that has printed that much."""
    session = Session(stack)
    session.start()
    for last, size in FLOODS:
        while length - session.offset >= size:
            flood(session, last)
    calm(session)
    return session


def _figures(name: str, seconds: Mapping[str, list[float]]) -> Iterator[Figure]:
    for label, each in seconds.items():
        yield Figure(f"{name}, {label}, p50", "ms", {OURS: 1e3 * median(each)})


def _first_bytes(stack: Stack, session: str, offset: int) -> float:
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
