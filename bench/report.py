"""Figures, and the table of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

OURS = "pigeon"
AGENT, PTY = "agent alone", "raw PTY"
RAW = "bare clients"  # the same calls on Google's generated clients, with nothing of ours around them
BARE_POD, BARE_EXEC = "bare pod", "our exec"  # a pod that sleeps; a program on our exec client, without an agent
EMBEDDED = "embedded"  # what is measured on emulators, on the embedded profile
FLOORS = (AGENT, PTY, RAW, EMBEDDED, BARE_POD, BARE_EXEC)  # parts of us, measured by themselves: no rivals


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table: what was measured, in which unit, and the value for each subject."""

    name: str
    unit: str
    values: dict[str, float]
    more_is_better: bool = False

    @property
    def ratio(self) -> float | None:
        """How many times better we are than the best peer; below 1 we are behind. None without a peer."""
        peers = [value for subject, value in self.values.items() if subject not in (OURS, *FLOORS)]
        if not peers or not self.values.get(OURS):
            return None
        return self.values[OURS] / max(peers) if self.more_is_better else min(peers) / self.values[OURS]

    def as_json(self) -> dict[str, Any]:
        """For a file of results."""
        values = {subject: round(value, 3) for subject, value in self.values.items()}
        return {**asdict(self), "values": values}


def percentile(values: Iterable[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def median(values: Iterable[float]) -> float:
    """The middle one."""
    return percentile(values, 0.5)


def latencies(name: str, seconds: dict[str, list[float]]) -> list[Figure]:
    """p50 and p99, in milliseconds."""
    return [
        Figure(f"{name}, {label}", "ms", {who: 1e3 * percentile(each, share) for who, each in seconds.items() if each})
        for label, share in (("p50", 0.5), ("p99", 0.99))
    ]


def table(figures: Sequence[Figure]) -> str:
    """In Markdown: a column for us, for each peer and for each floor; the last one compares us to the best peer."""
    seen = dict.fromkeys(who for figure in figures for who in figure.values)
    subjects = [OURS, *(who for who in seen if who not in (OURS, *FLOORS)), *(who for who in FLOORS if who in seen)]
    rows = [["", "unit", *subjects, "times better"], ["---", "---", *("---:" for _ in subjects), "---:"]]
    for figure in figures:
        cells = [_number(figure.values.get(subject)) for subject in subjects]
        rows.append([figure.name, figure.unit, *cells, _number(figure.ratio)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(_line(row, widths) for row in rows)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
