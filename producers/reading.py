"""Finding and reading the chunks of a transcript."""

from __future__ import annotations

from producers.transcripts import TranscriptReader
from schemas.documents import Chunk, Session, chunks_of, session_path
from schemas.ids import chunk_id
from schemas.limits import MAX_CHUNK_BYTES
from schemas.ports import Query, Snapshot, Store
from schemas.transcript import Piece

MAX_PAGE = 32  # documents: bounds the memory of a page, should large chunks follow small ones


class Tape:
    """A transcript and how far it was read; `owner` is the path of the session or transfer it belongs to."""

    def __init__(self, store: Store, owner: str, position: int = 0) -> None:
        self.collection = chunks_of(owner)
        self.last_id = ""  # of the last chunk that was taken
        self._store = store
        self._reader = TranscriptReader(position)
        self._located = position == 0
        self._average = MAX_CHUNK_BYTES  # of the chunks seen last, in bytes

    @property
    def position(self) -> int:
        """The offset after everything that was returned."""
        return self._reader.position

    def take(self, snapshots: list[Snapshot]) -> list[Piece]:
        """What these chunks, the next ones in order, add."""
        if not snapshots:
            return []
        before = self.position
        pieces = [piece for snapshot in snapshots for piece in self._reader.feed(Chunk.of(snapshot))]
        self._average = (self.position - before) // len(snapshots)
        self.last_id = snapshots[-1].id
        return pieces

    def finish(self, final_offset: int) -> list[Piece]:
        """What is missing up to the end of a complete transcript."""
        return list(self._reader.finish(final_offset))

    async def page(self, limit: int) -> tuple[list[Piece], bool]:
        """The next pieces, about `limit` bytes, and whether that is all there is now."""
        if not self._located:
            return await self._locate(), False
        count = min(MAX_PAGE, max(1, limit // max(1, self._average)))  # small chunks are read many at a time
        snapshots = await self._store.query(Query(self.collection, after=self.last_id, limit=count))
        return self.take(snapshots), len(snapshots) < count

    async def read(self, limit: int) -> tuple[list[Piece], bool]:
        """At least `limit` bytes, or all there is now; and whether that is all."""
        start, pieces, complete = self.position, list[Piece](), False
        while not complete and self.position - start < limit:
            page, complete = await self.page(limit)
            pieces += page
        return pieces, complete

    async def _locate(self) -> list[Piece]:
        """Find the chunk that holds the position, and take what it has from there on."""
        query = Query(self.collection, descending=True, limit=1, after=chunk_id(self.position + 1))
        snapshots = await self._store.query(query)
        self._located = True
        return self.take(snapshots)


async def final_offset(store: Store, name: str, session: Session) -> int:
    """Where the transcript of an ended session ends."""
    if session.final_offset is not None:
        return session.final_offset
    newest = await store.query(Query(chunks_of(session_path(name)), descending=True, limit=1))
    return Chunk.of(newest[0]).end if newest else 0
