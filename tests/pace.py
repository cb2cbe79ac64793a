"""How fast a transcript was written: a busy machine prints in pieces what takes one breath elsewhere."""

from __future__ import annotations

from schemas.documents import Chunk, chunks_of, session_path
from schemas.ports import Query, Store
from schemas.transcript import Pacer

# A fourth chunk may be written no sooner than two intervals after the first: see Pacer.
BREATH_SECONDS = 1.5 * Pacer.URGENT_INTERVAL


async def in_a_breath(store: Store, session: str, count: int) -> bool:
    """Whether the session's last `count` chunks were written within BREATH_SECONDS."""
    page = await store.query(Query(chunks_of(session_path(session)), descending=True, limit=max(1, count)))
    written = [Chunk.of(snapshot).at for snapshot in page]
    return (max(written) - min(written)).total_seconds() < BREATH_SECONDS
