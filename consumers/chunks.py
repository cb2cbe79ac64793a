"""Chunk documents: only ever created."""

from __future__ import annotations

from datetime import datetime

from consumers.context import Context
from schemas.documents import Chunk, chunk_path, chunks_of
from schemas.errors import AlreadyExists, Unavailable
from schemas.ports import Query
from schemas.transcript import Data, Gap, Piece


def piece_of(chunk: Chunk) -> Piece:
    """What a stored chunk says."""
    if chunk.kind == "gap":
        return Gap(chunk.offset, chunk.length, chunk.reason)
    return Data(chunk.offset, chunk.data)


async def append(context: Context, owner: str, piece: Piece, expire_at: datetime) -> Piece:
    """Create the chunk that starts at this piece's offset; returns what stands there: `piece`, or the winner.

    Raises StoreUnavailable; the chunk may then be there or not, and repeating the call finds out.
    """
    path = chunk_path(owner, piece.offset)
    if isinstance(piece, Gap):
        chunk = Chunk(
            kind="gap",
            offset=piece.offset,
            length=piece.length,
            reason=piece.reason,
            at=context.now(),
            expire_at=expire_at,
        )
    else:
        chunk = Chunk(offset=piece.offset, data=piece.data, at=context.now(), expire_at=expire_at)
    try:
        await context.store.create(path, chunk.fields())
    except AlreadyExists:
        snapshot = await context.store.get(path)
        if snapshot is None:
            raise Unavailable(f"the chunk at {piece.offset} exists and cannot be read") from None
        return piece_of(Chunk.of(snapshot))
    return piece


async def last(context: Context, owner: str) -> Chunk | None:
    """The newest chunk, or None where there is none."""
    page = await context.store.query(Query(chunks_of(owner), descending=True, limit=1))
    return Chunk.of(page[0]) if page else None


async def seal(context: Context, owner: str, reason: str, expire_at: datetime) -> int:
    """End a transcript whose writer is gone with a gap of unknown length; returns the final offset."""
    newest = await last(context, owner)
    offset = newest.end if newest is not None else 0
    if newest is not None and newest.kind == "gap" and newest.length is None:
        return newest.offset
    while True:
        piece = await append(context, owner, Gap(offset, None, reason), expire_at)
        if isinstance(piece, Gap) and piece.length is None:
            return piece.offset
        offset = piece.end
