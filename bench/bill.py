"""What commands and output cost on Firestore and Pub/Sub: exact counts, and dollars by the list prices below."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench.counted import Place, Session, deployment
from bench.emulators import Emulators
from bench.report import OURS, Figure, median
from bench.tally import Tally
from schemas.documents import Command

WRITE_DOLLARS = 0.18 / 100_000  # Firestore, a multi-region of North America, beyond what is free
READ_DOLLARS = 0.06 / 100_000
BYTE_DOLLARS = 40 / 2**40  # Pub/Sub: published and delivered, a request counts as 1,000 bytes at least
SHORT = ("true", "echo hello", "pwd; date; uname -a")
FLOOD = "seq 1 1000000"
TRICKLE = "for n in $(seq 1 50); do echo a line of output, number $n; sleep 0.1; done"
DOLLARS = "dollars"
WAYS = ("Listen", "RunQuery")  # in which a reader's stream gets documents

Counts = dict[str, float]


def measure(emulators: Emulators, folder: Path, python: Path, *, count: int) -> Iterator[Figure]:
    """Everything from a command's request until its one reader has the next prompt: medians of many short commands,
    then per megabyte of a flood, and per second of a trickle."""
    place = Place(folder, python, emulators.pubsub, emulators.firestore, emulators.project())
    short, flood, trickle = emulators.run(_measure(place, count))
    yield from _figures("a short command", short, "a million of them", 1e6)
    yield from _figures("a MB of flood", flood, "a GB", 1e3)
    yield from _figures("a second of trickle", trickle, "an hour", 3_600)


def _figures(words: str, counts: Counts, many: str, how_many: float) -> Iterator[Figure]:
    for name, value in counts.items():
        if name != DOLLARS:
            yield Figure(f"{words}: {name}", "", {OURS: value})
    yield Figure(f"- {many}", "$", {OURS: counts[DOLLARS] * how_many})


async def _measure(place: Place, count: int) -> tuple[Counts, Counts, Counts]:
    async with deployment(place) as opened, opened.session() as session:
        taken = [(await _counted(session, text))[0] for _ in range(count) for text in SHORT]
        short = {name: median(each[name] for each in taken) for name in taken[0]}
        flood, record = await _counted(session, FLOOD)
        assert record.start_offset is not None
        assert record.end_offset is not None
        trickle, slow = await _counted(session, TRICKLE)
        assert slow.seconds is not None
        return short, _per(flood, (record.end_offset - record.start_offset) / 1e6), _per(trickle, slow.seconds)


async def _counted(session: Session, text: str) -> tuple[Counts, Command]:
    """What running it costs, and its record."""
    tally = session.deployment.tally
    tally.clear()
    record = await session.run(text)
    return _counts(tally), record


def _counts(tally: Tally) -> Counts:
    writes, reads = tally.writes.total(), tally.reads.total()
    read = sum(tally.reads[way] for way in WAYS)
    dollars = writes * WRITE_DOLLARS + reads * READ_DOLLARS + tally.pubsub_bytes * BYTE_DOLLARS
    return {
        "Firestore writes": writes,
        "Firestore reads by the way in and the worker": reads - read,
        "Firestore reads by each reader": read,
        "Pub/Sub messages": tally.messages.total(),
        DOLLARS: dollars,
    }


def _per(counts: Counts, units: float) -> Counts:
    return {name: value / units for name, value in counts.items()}
