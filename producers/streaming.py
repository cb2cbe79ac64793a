"""The transcript as server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

from __future__ import annotations

import asyncio
import logging
from binascii import b2a_base64
from collections.abc import AsyncGenerator, Iterable

from pydantic import TypeAdapter
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from producers.intake import Call, parameter, visible_session
from producers.problems import problem_document
from producers.reading import Tape, final_offset
from producers.status import session_status
from producers.waiting import cancel, closing, merge, ticks
from schemas.documents import Session, session_path
from schemas.errors import Malformed, PigeonError
from schemas.http import Offset, SessionStatus, StreamedEnd, StreamedGap
from schemas.lifecycle import ENDED
from schemas.limits import MAX_CHUNK_BYTES
from schemas.model import Model
from schemas.transcript import Data, Piece

logger = logging.getLogger(__name__)

OFFSET: TypeAdapter[int] = TypeAdapter(Offset)
KEEP_ALIVE_SECONDS = 15.0  # proxies cut a connection on which nothing moves
KEEP_ALIVE = b": keep-alive\n\n"
BATCH = 8  # chunks in memory for each stream, twice
PAGE_BYTES = BATCH * MAX_CHUNK_BYTES
HEADERS = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}
UNSTABLE = {"last_activity_at", "usage"}  # fields whose change alone is not worth an event

CHUNKS, STATES = 0, 1


async def stream_output(call: Call) -> Response:
    """Everything from an offset on, then what comes, until the session has ended or the client is gone."""
    name = call.last_segment
    position = call.query("from", OFFSET, 0)
    last_event_id = call.request.headers.get("last-event-id")
    if last_event_id is not None:
        position = parameter("Last-Event-ID", OFFSET, last_event_id)
    session = await visible_session(call, name)
    if session.state in ENDED:
        final = await final_offset(call.services.store, name, session)
        if position > final:
            raise Malformed(f"from: the transcript has ended at {final}")
    return EventStream(_frames(call, name, session, position), headers=HEADERS, media_type="text/event-stream")


class EventStream(StreamingResponse):
    """Sends frames until they end or the client goes away; the generator is closed at once in either case."""

    def __init__(self, frames: AsyncGenerator[bytes, None], *, headers: dict[str, str], media_type: str) -> None:
        super().__init__(frames, headers=headers, media_type=media_type)
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        sending = asyncio.ensure_future(self.stream_response(send))
        leaving = asyncio.ensure_future(self.listen_for_disconnect(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await cancel(sending, leaving)
            await self._frames.aclose()


async def _frames(call: Call, name: str, session: Session, position: int) -> AsyncGenerator[bytes, None]:
    try:
        async with closing(_events(call, name, session, position)) as events:
            async for frame in events:
                yield frame
    except PigeonError as error:
        logger.warning("the stream of session %s breaks off: %s", name, error)
        yield _frame(b"problem", problem_document(error))


async def _events(call: Call, name: str, session: Session, position: int) -> AsyncGenerator[bytes, None]:
    tape = Tape(call.services.store, session_path(name), position)
    yield _frame(b"state", session_status(name, session))
    pieces, _ = await tape.page(PAGE_BYTES)
    yield _piece_frames(pieces)
    if session.state not in ENDED:
        async with closing(_live(call, name, session, tape)) as live:
            async for frame, latest in live:
                session = latest
                yield frame
    complete = False
    while not complete:
        pieces, complete = await tape.page(PAGE_BYTES)
        yield _piece_frames(pieces)
    final = await final_offset(call.services.store, name, session)
    yield _piece_frames(tape.finish(final))
    yield _frame(b"end", StreamedEnd(final_offset=final))


async def _live(call: Call, name: str, session: Session, tape: Tape) -> AsyncGenerator[tuple[bytes, Session], None]:
    """Frames of a session that lives, each with the session as it is known by then; ends when the session has."""
    store, clock = call.services.store, call.services.clock
    shown = session_status(name, session)
    chunks = store.follow(tape.collection, after=tape.last_id, limit=BATCH)
    sources = merge(chunks, store.watch(session_path(name)), ticks(clock, KEEP_ALIVE_SECONDS))
    async with closing(sources) as news:
        async for source, item in news:
            if source == CHUNKS:
                yield _piece_frames(tape.take(item)), session
            elif source == STATES:
                if item is None:
                    return
                session = Session.of(item)
                status = session_status(name, session)
                if _differs(status, shown):
                    shown = status
                    yield _frame(b"state", status), session
                if session.state in ENDED:
                    return
            else:
                yield KEEP_ALIVE, session


def _differs(one: SessionStatus, other: SessionStatus) -> bool:
    return one.model_dump(exclude=UNSTABLE) != other.model_dump(exclude=UNSTABLE)


def _piece_frames(pieces: Iterable[Piece]) -> bytes:
    return b"".join(_piece_frame(piece) for piece in pieces)


def _piece_frame(piece: Piece) -> bytes:
    if isinstance(piece, Data):  # StreamedData, formatted by hand: this is the hot way
        text = b2a_base64(piece.data, newline=False)
        return b'id: %d\ndata: {"offset":%d,"data":"%b"}\n\n' % (piece.end, piece.offset, text)
    gap = StreamedGap(offset=piece.offset, length=piece.length, reason=piece.reason)
    return b"id: %d\n%b" % (piece.end, _frame(b"gap", gap))


def _frame(event: bytes, model: Model) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event, model.model_dump_json(by_alias=True).encode())
