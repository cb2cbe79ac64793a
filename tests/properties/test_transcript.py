"""The transcript's rules, for every way the bytes can arrive and every race that can be lost."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import Diverged
from schemas.limits import MAX_CHUNK_BYTES
from schemas.transcript import Data, Gap, Pacer, Piece, TranscriptWriter


def data_pieces(parts: list[bytes], offset: int = 0) -> list[Data]:
    pieces = []
    for part in parts:
        pieces.append(Data(offset, part))
        offset += len(part)
    return pieces


class Log:
    """Create-only chunks, as a store keeps them."""

    def __init__(self) -> None:
        self.chunks: dict[int, Piece] = {}

    def create(self, piece: Piece) -> Piece:
        return self.chunks.setdefault(piece.offset, piece)

    def content(self) -> bytes:
        return b"".join(piece.data for _, piece in sorted(self.chunks.items()) if isinstance(piece, Data))

    def assert_contiguous(self) -> None:
        pieces = [piece for _, piece in sorted(self.chunks.items())]
        assert not pieces or pieces[0].offset == 0
        for before, after in pairwise(pieces):
            assert before.end == after.offset


def commit_one(writer: TranscriptWriter, log: Log) -> bool:
    piece = writer.take()
    if piece is None:
        return False
    there = log.create(piece)
    if there is piece:
        writer.committed()
    else:
        writer.lost_to(there)
    return True


parts = st.lists(st.binary(min_size=1, max_size=40), max_size=20)


@given(parts, st.lists(st.booleans(), max_size=60))
def test_whatever_is_fed_comes_out_whole_and_in_order(stream: list[bytes], commits: list[bool]) -> None:
    """However feeding and committing interleave, the chunks hold exactly the stream."""
    log, writer, waiting = Log(), TranscriptWriter(0), data_pieces(stream)
    for commit in commits:
        if commit:
            commit_one(writer, log)
        elif waiting:
            writer.feed(waiting.pop(0))
    for piece in waiting:
        writer.feed(piece)
    while commit_one(writer, log):
        pass
    assert log.content() == b"".join(stream)
    log.assert_contiguous()
    assert writer.idle
    assert writer.committed_offset == sum(map(len, stream))


@given(st.binary(min_size=1, max_size=200), st.data())
def test_two_writers_of_one_stream_make_no_gap_and_no_double(stream: bytes, draw: st.DataObject) -> None:
    """A slow old worker and its successor race for every chunk; the transcript is the stream all the same."""
    log, writers, fed = Log(), [TranscriptWriter(0), TranscriptWriter(0)], [0, 0]
    for _ in range(draw.draw(st.integers(0, 60))):
        who = draw.draw(st.integers(0, 1))
        if draw.draw(st.booleans()):
            commit_one(writers[who], log)
        elif fed[who] < len(stream):
            size = draw.draw(st.integers(1, len(stream) - fed[who]))
            writers[who].feed(Data(fed[who], stream[fed[who] : fed[who] + size]))
            fed[who] += size
    for who, writer in enumerate(writers):
        if fed[who] < len(stream):
            writer.feed(Data(fed[who], stream[fed[who] :]))
        while commit_one(writer, log):
            pass
        assert writer.committed_offset == len(stream)
    assert log.content() == stream
    log.assert_contiguous()


@given(st.lists(st.one_of(st.integers(1, 50), st.binary(min_size=1, max_size=50)), max_size=20))
def test_gaps_keep_their_length_in_the_offsets(stream: list[int | bytes]) -> None:
    """Bytes that were given up advance the offsets by their number."""
    log, writer, offset = Log(), TranscriptWriter(0), 0
    for part in stream:
        piece: Piece = Data(offset, part) if isinstance(part, bytes) else Gap(offset, part, "output_budget")
        writer.feed(piece)
        offset = piece.end
    while commit_one(writer, log):
        pass
    log.assert_contiguous()
    assert writer.committed_offset == offset
    assert log.content() == b"".join(part for part in stream if isinstance(part, bytes))


def test_a_different_byte_is_a_defect_and_says_so() -> None:
    """Two writers that saw different bytes at one offset never paper it over."""
    log, writer = Log(), TranscriptWriter(0)
    log.create(Data(0, b"abc"))
    writer.feed(Data(0, b"abX"))
    with pytest.raises(Diverged):
        commit_one(writer, log)


def test_bytes_that_differ_beyond_what_was_fed_are_noticed_when_they_come() -> None:
    """The winner was ahead: what arrives later is compared with what it wrote."""
    log, writer = Log(), TranscriptWriter(0)
    log.create(Data(0, b"abcdef"))
    writer.feed(Data(0, b"abc"))
    commit_one(writer, log)
    with pytest.raises(Diverged):
        writer.feed(Data(3, b"dXf"))


def test_a_jump_in_the_stream_is_refused() -> None:
    """A piece that does not start where the last one ended would be a gap nobody declared."""
    writer = TranscriptWriter(0)
    writer.feed(Data(0, b"abc"))
    with pytest.raises(Diverged):
        writer.feed(Data(4, b"e"))


def test_a_sealed_transcript_takes_no_more() -> None:
    """A gap of unknown length is the last thing a transcript says, whoever wrote it."""
    log, writer = Log(), TranscriptWriter(0)
    log.create(Gap(0, None, "closing took too long"))
    writer.feed(Data(0, b"abc"))
    commit_one(writer, log)
    assert writer.sealed


def test_chunks_stay_within_their_limit() -> None:
    """A flood is cut at the size a document may have."""
    log, writer = Log(), TranscriptWriter(0)
    writer.feed(Data(0, bytes(3 * MAX_CHUNK_BYTES + 5)))
    assert writer.full
    while commit_one(writer, log):
        pass
    assert [len(piece.data) for piece in log.chunks.values() if isinstance(piece, Data)] == [MAX_CHUNK_BYTES] * 3 + [5]


def test_pacing_never_holds_back_what_a_person_waits_for() -> None:
    """The first chunk after quiet, an echo and a full chunk go at once."""
    pacer = Pacer()
    assert pacer.ready_at(urgent=False, full=False) <= 0.0
    for tick in range(100):
        pacer.wrote(tick * 0.05)
    assert pacer.ready_at(urgent=True, full=False) <= 5.0
    assert pacer.ready_at(urgent=False, full=True) <= 5.0
    assert pacer.ready_at(urgent=False, full=False) <= 5.0 - 0.05 + Pacer.MAX_INTERVAL


def test_a_sustained_trickle_costs_at_most_about_four_chunks_a_second() -> None:
    """A minute of one line every ten milliseconds is 240 chunks and a few, not 6,000."""
    pacer, now, chunks = Pacer(), 0.0, 0
    while now < 60.0:
        now += 0.01
        if now >= pacer.ready_at(urgent=False, full=False):
            pacer.wrote(now)
            chunks += 1
    assert 200 <= chunks <= 260
