"""Reading a transcript, free of I/O: chunk documents in, pieces or text out."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from schemas.documents import Chunk
from schemas.transcript import Data, Gap, Piece

MISSING = "missing"  # the reason of a gap for chunks that should be there and are not: they expire together


class TranscriptReader:
    """Turns chunks, fed in the order of their offsets, into contiguous pieces from `position` on.

    Every byte comes out once: what lies before the position is cut off, and a hole becomes a gap.
    """

    def __init__(self, position: int) -> None:
        self.position = position

    def feed(self, chunk: Chunk) -> Iterator[Piece]:
        """What this chunk adds."""
        if chunk.end < self.position or (chunk.end == self.position and not _is_open_gap(chunk)):
            return
        if chunk.offset > self.position:
            yield self._skip_to(chunk.offset)
        piece = _rest(chunk, self.position)
        self.position = piece.end
        yield piece

    def finish(self, final_offset: int) -> Iterator[Piece]:
        """The transcript has ended at `final_offset`, and there are no more chunks."""
        if final_offset > self.position:
            yield self._skip_to(final_offset)

    def _skip_to(self, offset: int) -> Gap:
        gap = Gap(self.position, offset - self.position, MISSING)
        self.position = offset
        return gap


def _is_open_gap(chunk: Chunk) -> bool:
    return chunk.kind == "gap" and chunk.length is None


def _rest(chunk: Chunk, position: int) -> Piece:
    skipped = position - chunk.offset
    if chunk.kind == "data":
        return Data(position, chunk.data[skipped:] if skipped else chunk.data)
    return Gap(position, None if chunk.length is None else chunk.length - skipped, chunk.reason)


def cut(pieces: Iterable[Piece], limit: int) -> tuple[list[Piece], bool]:
    """The first `limit` bytes of data among these pieces, and whether that is all of them."""
    kept: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, Data):
            if limit == 0:
                return kept, False
            if len(piece.data) > limit:
                return [*kept, Data(piece.offset, piece.data[:limit])], False
            limit -= len(piece.data)
        kept.append(piece)
    return kept, True


def as_text(pieces: Iterable[Piece], position: int, *, ended: bool) -> tuple[str, int]:
    """Contiguous pieces as text, and the offset that the text reaches from `position` on.

    A character that has only begun, at most 3 bytes, is left for the next time unless nothing follows it. Bytes that
    are no UTF-8 become U+FFFD, and a gap a line in brackets.
    """
    texts: list[str] = []
    held = b""
    for piece in pieces:
        if isinstance(piece, Gap):
            texts += [_decode(held, final=True)[0], _gap_line(piece)]
            held = b""
        else:
            data = held + piece.data if held else piece.data
            text, used = _decode(data, final=False)
            texts.append(text)
            held = data[used:]
        position = piece.end
    if ended:
        texts.append(_decode(held, final=True)[0])
        held = b""
    return "".join(texts), position - len(held)


def _decode(data: bytes, *, final: bool) -> tuple[str, int]:
    return codecs.utf_8_decode(data, "replace", final)


def _gap_line(gap: Gap) -> str:
    size = "an unknown number of bytes" if gap.length is None else f"{gap.length} bytes"
    return f"\r\n[{size} of output are missing here: {gap.reason}]\r\n"
