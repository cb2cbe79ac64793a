"""The sans-I/O parts: the spool, the budget, the filter that takes our marks out of the stream."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.agent.agent import Gap, MarkFilter, ShellMark, Spool, Transcript
from tests.agent.test_wire import cut

NONCE = "31415926535897932384"
MARK = b"\x1b]133;" + NONCE.encode() + b";"
ECHO = b" . /run/x/17\r\n"
PASTE = b"\x1b[?2004l"

FRAGMENTS = st.sampled_from(
    [
        *(
            b"\x1b",
            b"\x1b]",
            b"\x1b]133;",
            b"\x1b]133;C;other\x07",
            MARK,
            MARK[:-3],
            b"\x07",
            b"\x18",
            b" ",
            b" . ",
            ECHO,
        ),
        *(
            ECHO[:5],
            PASTE,
            PASTE + b"\r",
            MARK + b"D;0;1\x07",
            MARK + b"X;7\x07",
            MARK + b"x" * 70 + b"\x07",
            b"text\r\n",
        ),
    ]
)
STREAMS = st.lists(st.one_of(FRAGMENTS, st.binary(max_size=20)), max_size=12).map(b"".join)
CUTS = st.lists(st.integers(0, 1_000), max_size=12)


def filtered(
    filter: MarkFilter, pieces: list[bytes], release: bool = True
) -> tuple[bytes, list[tuple[int, ShellMark]]]:
    """The stripped stream, and each mark with the offset at which it stood."""
    out, marks = bytearray(), []
    for data in pieces:
        for piece in filter.feed(data):
            if isinstance(piece, ShellMark):
                marks.append((len(out), piece))
            else:
                out += piece
    return bytes(out) + (filter.release() if release else b""), marks


@given(STREAMS, CUTS, st.booleans())
def test_marks_and_stream_do_not_depend_on_the_cuts(stream: bytes, cuts: list[int], armed: bool) -> None:
    """Any split of the terminal's output gives the same stripped stream and the same marks at the same offsets."""
    whole, pieces = MarkFilter(NONCE), MarkFilter(NONCE)
    if armed:
        whole.expect((ECHO, b""), (PASTE + b"\r", PASTE))
        pieces.expect((ECHO, b""), (PASTE + b"\r", PASTE))
    assert filtered(whole, [stream]) == filtered(pieces, cut(stream, cuts))


@given(STREAMS, CUTS)
def test_no_foreign_byte_is_lost(stream: bytes, cuts: list[int]) -> None:
    """What is taken out is exactly our marks: putting them back gives the stream that was printed."""
    out, marks = filtered(MarkFilter(NONCE), cut(stream, cuts))
    for offset, mark in reversed(marks):
        out = out[:offset] + MARK + ";".join(mark.fields).encode("latin-1") + b"\x07" + out[offset:]
    assert out == stream


@given(STREAMS, CUTS)
def test_a_late_half_of_a_mark_is_still_a_mark(stream: bytes, cuts: list[int]) -> None:
    """What was held back too long and released does not cost a mark, only a visible beginning and a CAN."""
    filter = MarkFilter(NONCE)
    found = []
    for data in cut(stream, cuts):
        found += [piece for piece in filter.feed(data) if isinstance(piece, ShellMark)]
        filter.release()
    assert found == [mark for _, mark in filtered(MarkFilter(NONCE), [stream])[1]]


def test_a_released_start_is_cancelled_when_the_mark_completes() -> None:
    """The reader's terminal is not left inside a broken sequence."""
    filter = MarkFilter(NONCE)
    assert filter.feed(b"a" + MARK[:4]) == [b"a"]
    assert filter.release() == MARK[:4]
    assert filter.feed(MARK[4:] + b"C\x07b") == [b"\x18", ShellMark(b"C"), b"b"]


def test_hold_back_is_bounded() -> None:
    """A mark that never ends is not ours and is given out."""
    filter = MarkFilter(NONCE)
    filter.feed(MARK)
    out = b"".join(piece for piece in filter.feed(b"x" * 100) if isinstance(piece, bytes))
    assert out == MARK + b"x" * 100
    assert filter.held == 0


def test_only_the_first_exact_echo_goes() -> None:
    """The echo of our typing disappears once; the same text printed again is somebody's output."""
    filter = MarkFilter(NONCE)
    filter.expect((ECHO, b""), (PASTE + b"\r", PASTE))
    out, _ = filtered(filter, [b"$ ", ECHO, PASTE, b"\r", ECHO])
    assert out == b"$ " + PASTE + ECHO
    assert filter.unseen == 0


def test_an_echo_that_differs_stays() -> None:
    """Where the terminal wrapped the line, every byte is kept."""
    filter = MarkFilter(NONCE)
    filter.expect((ECHO, b""))
    assert filtered(filter, [ECHO[:6], b" \r", ECHO[6:]])[0] == ECHO[:6] + b" \r" + ECHO[6:]
    assert filter.unseen == 1


SPOOL_STEPS = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=6_000),
        st.integers(1, 10_000),
        st.floats(0, 1).map(lambda share: ("ack", share)),
    ),
    max_size=20,
)


@given(SPOOL_STEPS)
def test_the_spool_gives_back_what_was_appended(steps: list[bytes | int | tuple[str, float]]) -> None:
    """From any kept offset a reader gets every byte and every gap, and `held` counts the bytes."""
    spool, model = Spool(), list[int | None]()
    start = 0
    for step in steps:
        if isinstance(step, bytes):
            spool.append(step)
            model += step
        elif isinstance(step, int):
            spool.append_gap(step, "r")
            model += [None] * step
        else:
            start = max(start, int(step[1] * len(model)))
            spool.ack(start)
        assert (spool.start, spool.end) == (start, len(model))
        assert spool.held == sum(item is not None for item in model[start:])
    for position in {start, (start + len(model)) // 2}:
        assert read_all(spool, position) == model[position:]


def read_all(spool: Spool, position: int) -> list[int | None]:
    """Everything from `position` on, None for a byte given up."""
    found: list[int | None] = []
    while position < spool.end:
        run = spool.read(position, 700)
        found += [None] * run.length if isinstance(run, Gap) else list(run)
        position += len(run)
    return found


def test_the_spool_refuses_offsets_it_does_not_keep() -> None:
    """Neither what was acked nor what was not printed can be read."""
    spool = Spool()
    spool.append(b"abc")
    spool.ack(1)
    for offset in (0, 3):
        with pytest.raises(IndexError):
            spool.read(offset, 1)


def test_a_million_key_echoes_are_few_objects() -> None:
    """Small runs are joined: memory follows the bytes, not the reads."""
    spool = Spool()
    for _ in range(100_000):
        spool.append(b"x")
    assert spool.held == 100_000
    assert len(spool._runs) < 50


@given(st.lists(st.binary(max_size=40)), st.integers(0, 200))
def test_the_budget_counts_every_byte(writes: list[bytes], budget: int) -> None:
    """What is within the budget is kept, and what is not is counted to the byte."""
    transcript = Transcript(budget)
    for data in writes:
        transcript.write(data)
    transcript.settle_gap()
    printed = b"".join(writes)
    assert transcript.end == len(printed)
    assert transcript.discarded == max(0, len(printed) - budget)
    kept = bytes(byte for byte in read_all(transcript.spool, 0) if byte is not None)
    assert kept == printed[:budget]


def test_a_gap_belongs_before_the_mark_that_follows_it() -> None:
    """The offset of a mark counts what was thrown away before it."""
    transcript = Transcript(budget=3)
    transcript.write(b"abcdef")
    transcript.mark("finished")
    assert transcript.marks[0].offset == 6
