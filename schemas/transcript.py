"""The transcript's rules, free of I/O: bytes in, chunks out.

A session prints one stream. Chunks are only ever created, each starting where the last one ended, one commit in flight;
so two writers of the same stream can make neither a gap nor a double. Who loses a race checks that the winner wrote the
same bytes, and goes on from its end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from schemas.errors import Diverged
from schemas.limits import MAX_CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of the stream from `offset` on; never empty."""

    offset: int
    data: bytes

    @property
    def end(self) -> int:
        """The offset after the last byte."""
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True)
class Gap:
    """Bytes that were given up. `length` None: nobody knows how many; nothing follows such a gap."""

    offset: int
    length: int | None
    reason: str

    @property
    def end(self) -> int:
        """The offset after the gap."""
        return self.offset + (self.length or 0)


Piece = Data | Gap


class TranscriptWriter:
    """Cuts a stream into chunks and settles races for them.

    Feed it pieces in the order of their offsets; `take` the next chunk, commit it, and say `committed` or `lost_to`.
    One chunk is in flight at a time.
    """

    def __init__(self, offset: int) -> None:
        self.committed_offset = offset
        self.sealed = False  # a gap of unknown length was committed: the transcript is complete
        self._fed = offset
        self._pending: deque[Piece] = deque()  # contiguous, from committed_offset
        self._pending_bytes = 0
        self._ahead: deque[Piece] = deque()  # what a winner committed beyond all that was fed here
        self._in_flight: Piece | None = None

    @property
    def fed_offset(self) -> int:
        """The offset after everything fed so far."""
        return self._fed

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is in flight."""
        return not self._pending and self._in_flight is None

    @property
    def full(self) -> bool:
        """A whole chunk waits; there is nothing to gain by waiting longer."""
        return self._pending_bytes >= MAX_CHUNK_BYTES

    def feed(self, piece: Piece) -> None:
        """Take in the next piece. Raises Diverged if it does not start where the last one ended."""
        if piece.offset != self._fed:
            raise Diverged(f"the stream jumped from offset {self._fed} to {piece.offset}")
        self._fed = piece.end
        rest = _reconcile(self._ahead, piece)
        if rest is not None:
            self._push(rest)

    def take(self) -> Piece | None:
        """The next chunk, at most MAX_CHUNK_BYTES of data, or one gap; None while one is in flight or none waits."""
        if self._in_flight is not None or not self._pending:
            return None
        first = self._pending[0]
        self._in_flight = self._take_gap() if isinstance(first, Gap) else self._take_data()
        return self._in_flight

    def committed(self) -> None:
        """The chunk in flight is durable."""
        piece = self._landed()
        self.committed_offset = piece.end
        self.sealed = isinstance(piece, Gap) and piece.length is None

    def lost_to(self, winner: Piece) -> None:
        """Somebody else's chunk stands at this offset. Raises Diverged if it does not hold the same bytes."""
        mine = self._landed()
        self._pending.appendleft(mine)
        self._pending_bytes += _size(mine)
        self.committed_offset = winner.end
        if isinstance(winner, Gap) and winner.length is None:
            self.sealed = True
            return
        rest: Piece | None = winner
        while rest is not None and self._pending:
            mine = self._pending.popleft()
            self._pending_bytes -= _size(mine)
            rest, left = _subtract(rest, mine)
            if left is not None:
                self._pending.appendleft(left)
                self._pending_bytes += _size(left)
        if rest is not None:
            self._ahead.append(rest)

    def _landed(self) -> Piece:
        if self._in_flight is None:
            raise RuntimeError("no chunk is in flight")
        piece, self._in_flight = self._in_flight, None
        return piece

    def _push(self, piece: Piece) -> None:
        self._pending.append(piece)
        self._pending_bytes += _size(piece)

    def _take_gap(self) -> Gap:
        gap = self._pending.popleft()
        assert isinstance(gap, Gap)
        while gap.length is not None and self._pending:
            following = self._pending[0]
            if not isinstance(following, Gap) or following.length is None or following.reason != gap.reason:
                break
            self._pending.popleft()
            gap = Gap(gap.offset, gap.length + following.length, gap.reason)
        return gap

    def _take_data(self) -> Data:
        offset, parts, room = self._pending[0].offset, [], MAX_CHUNK_BYTES
        while room and self._pending and isinstance(piece := self._pending[0], Data):
            self._pending.popleft()
            if len(piece.data) > room:
                self._pending.appendleft(Data(piece.offset + room, piece.data[room:]))
                piece = Data(piece.offset, piece.data[:room])
            parts.append(piece.data)
            room -= len(piece.data)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self._pending_bytes -= len(data)
        return Data(offset, data)


def _size(piece: Piece) -> int:
    return len(piece.data) if isinstance(piece, Data) else 0


def _reconcile(ahead: deque[Piece], piece: Piece) -> Piece | None:
    """Check `piece` against what a winner has committed already; what goes beyond it is returned."""
    rest: Piece | None = piece
    while rest is not None and ahead:
        winner, rest = _subtract(ahead.popleft(), rest)
        if winner is not None:
            ahead.appendleft(winner)
    return rest


def _subtract(one: Piece, other: Piece) -> tuple[Piece | None, Piece | None]:
    """Take away what two pieces of equal offset share; raises Diverged where they differ."""
    if isinstance(one, Data) and isinstance(other, Data):
        shared = min(len(one.data), len(other.data))
        if one.data[:shared] != other.data[:shared]:
            raise Diverged(f"two writers saw different bytes after offset {one.offset}")
    elif isinstance(one, Gap) and isinstance(other, Gap) and one.length is not None and other.length is not None:
        shared = min(one.length, other.length)
    else:
        raise Diverged(f"one writer saw bytes and another a gap at offset {one.offset}")
    return _after(one, shared), _after(other, shared)


def _after(piece: Piece, length: int) -> Piece | None:
    if isinstance(piece, Data):
        return Data(piece.offset + length, piece.data[length:]) if length < len(piece.data) else None
    assert piece.length is not None
    return Gap(piece.offset + length, piece.length - length, piece.reason) if length < piece.length else None


class Pacer:
    """When the next chunk may be written: at once for what a person waits for, at most four a second for a stream.

    The first chunk after a quiet spell, the answer to a keystroke and a full chunk are not held back; a sustained
    trickle doubles the interval up to MAX_INTERVAL, which bounds what a session can cost. Nobody types faster than a
    chunk every URGENT_INTERVAL for long: fingers come in bursts of URGENT_BURST, and what is urgent and comes faster is
    a program's. Times are in seconds of one monotonic clock.
    """

    FIRST_INTERVAL = 0.015
    MAX_INTERVAL = 0.25
    URGENT_INTERVAL = 0.04
    URGENT_BURST = 2

    def __init__(self) -> None:
        self._last = float("-inf")
        self._interval = 0.0
        self._credit = float(self.URGENT_BURST)  # urgent chunks that may be written at once
        self._urgent_from = float("-inf")

    def ready_at(self, *, urgent: bool, full: bool) -> float:
        """The moment from which the next chunk may be written; in the past means now."""
        if full:
            return float("-inf")
        paced = self._last + self._interval
        return min(paced, self._urgent_from) if urgent else paced

    def wrote(self, now: float) -> None:
        """A chunk was committed at `now`."""
        if now - self._last >= 2 * self.MAX_INTERVAL:
            self._interval = self.FIRST_INTERVAL
        else:
            self._interval = min(max(2 * self._interval, self.FIRST_INTERVAL), self.MAX_INTERVAL)
        earned = self._credit + (now - self._last) / self.URGENT_INTERVAL
        self._credit = max(0.0, min(self.URGENT_BURST, earned) - 1)
        self._urgent_from = now + max(0.0, 1 - self._credit) * self.URGENT_INTERVAL
        self._last = now
