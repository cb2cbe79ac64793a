"""Chunks in, pieces and text out."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from producers.transcripts import TranscriptReader, as_text, cut
from schemas.documents import Chunk
from schemas.transcript import Data, Gap, Piece

NOW = datetime(2026, 11, 2, tzinfo=UTC)


def data(offset: int, content: bytes) -> Chunk:
    return Chunk(offset=offset, data=content, at=NOW, expire_at=NOW)


def gap(offset: int, length: int | None, reason: str = "output_budget") -> Chunk:
    return Chunk(kind="gap", offset=offset, length=length, reason=reason, at=NOW, expire_at=NOW)


def read(chunks: list[Chunk], position: int) -> list[Piece]:
    reader = TranscriptReader(position)
    return [piece for chunk in chunks for piece in reader.feed(chunk)]


def chunked(content: bytes, cuts: list[int]) -> list[Chunk]:
    edges = sorted({0, len(content), *(edge % (len(content) + 1) for edge in cuts)})
    return [data(start, content[start:end]) for start, end in pairwise(edges)]


@given(st.binary(max_size=200), st.lists(st.integers(0, 200)), st.integers(0, 200))
def test_every_byte_from_the_position_on_comes_out_once(content: bytes, cuts: list[int], position: int) -> None:
    """However the writer cut the stream, and wherever a reader starts, inside a chunk or at its edge."""
    position = min(position, len(content))
    pieces = read(chunked(content, cuts), position)
    assert b"".join(piece.data for piece in pieces if isinstance(piece, Data)) == content[position:]
    ends = [position, *(piece.end for piece in pieces)]
    assert [piece.offset for piece in pieces] == ends[:-1]


@given(st.text(max_size=80), st.lists(st.integers(0, 320)), st.lists(st.integers(0, 320)))
def test_text_read_in_any_steps_is_the_text_that_was_printed(text: str, cuts: list[int], polls: list[int]) -> None:
    """A character that straddles chunks or polls comes out whole, once."""
    content = text.encode()
    chunks = chunked(content, cuts)
    seen, cursor = "", 0
    for until in sorted({min(poll, len(content)) for poll in polls}):
        there = [data(c.offset, c.data[: max(0, until - c.offset)]) for c in chunks if c.offset < until]
        part, cursor = as_text(read(there, cursor), cursor, ended=False)
        assert until - cursor <= 3
        seen += part
    part, cursor = as_text(read(chunks, cursor), cursor, ended=True)
    assert (seen + part, cursor) == (text, len(content))


@given(st.binary(max_size=60), st.lists(st.integers(0, 60)))
def test_bytes_that_are_no_text_never_stop_a_reader(content: bytes, cuts: list[int]) -> None:
    """`cat /bin/ls` prints replacement characters; the cursor still reaches the end."""
    text, cursor = as_text(read(chunked(content, cuts), 0), 0, ended=True)
    assert cursor == len(content)
    assert text == content.decode(errors="replace")


def test_a_started_character_is_flushed_at_the_end() -> None:
    """Nothing will complete it any more."""
    euro = "€".encode()
    assert as_text([Data(0, b"1" + euro[:2])], 0, ended=False) == ("1", 1)
    assert as_text([Data(1, euro[:2])], 1, ended=True) == ("\N{REPLACEMENT CHARACTER}", 3)


def test_a_gap_is_a_line_of_its_own() -> None:
    """Who reads text must see that bytes are missing, how many and why; a character cut by it is not held back."""
    pieces: list[Piece] = [Data(0, b"a\xe2"), Gap(2, 40, "output_budget"), Data(42, b"b")]
    text, cursor = as_text(pieces, 0, ended=False)
    assert text == "a\N{REPLACEMENT CHARACTER}\r\n[40 bytes of output are missing here: output_budget]\r\nb"
    assert cursor == 43


def test_a_gap_of_unknown_length_is_read_where_it_stands() -> None:
    """It has no length: its end is its offset, and a reader that is there already must still see it."""
    chunks = [data(0, b"abc"), gap(3, None, "evicted")]
    assert read(chunks, 0) == [Data(0, b"abc"), Gap(3, None, "evicted")]
    assert read(chunks, 3) == [Gap(3, None, "evicted")]
    assert "an unknown number of bytes" in as_text(read(chunks, 3), 3, ended=True)[0]


def test_the_rest_of_a_gap_is_read_from_inside_it() -> None:
    """A cursor may stand anywhere."""
    assert read([gap(0, 100)], 40) == [Gap(40, 60, "output_budget")]


def test_a_hole_is_reported_as_a_gap() -> None:
    """Chunks expire; a reader says so and goes on, rather than joining what was never adjacent."""
    assert read([data(10, b"xy")], 4) == [Gap(4, 6, "missing"), Data(10, b"xy")]
    reader = TranscriptReader(4)
    assert list(reader.finish(9)) == [Gap(4, 5, "missing")]
    assert list(reader.finish(9)) == []


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=9), st.integers(1, 40))
def test_cutting_keeps_exactly_the_limit(contents: list[bytes], limit: int) -> None:
    """An answer is bounded to the byte, and says whether something was left out."""
    pieces: list[Piece] = []
    for content in contents:
        pieces.append(Data(pieces[-1].end if pieces else 0, content))
    kept, whole = cut(pieces, limit)
    everything = b"".join(contents)
    assert b"".join(piece.data for piece in kept if isinstance(piece, Data)) == everything[:limit]
    assert whole == (len(everything) <= limit)
