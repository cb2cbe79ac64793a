"""The transcript as text, polled."""

from __future__ import annotations

from datetime import datetime, timedelta

from starlette.responses import Response

from producers.intake import Call, read_body, reply, visible_session
from producers.reading import Tape, final_offset
from producers.transcripts import as_text, cut
from producers.waiting import departure, first, merge, within
from schemas.documents import Cursor, Session, chunks_of, cursor_path, session_path
from schemas.errors import AlreadyExists, Conflict, Malformed
from schemas.http import GetOutputRequest, GetOutputResponse
from schemas.lifecycle import ENDED
from schemas.limits import MAX_LONG_POLL_SECONDS, MAX_POLL_BYTES
from schemas.ports import Snapshot

MAX_RACES = 5  # polls of one caller at the same time that may overtake this one


async def get_output(call: Call) -> Response:
    """What is new since the cursor; without a cursor, since this caller's last poll."""
    body = await read_body(call, GetOutputRequest)
    until = call.services.clock.now() + timedelta(seconds=min(body.wait, MAX_LONG_POLL_SECONDS))
    session = await visible_session(call, body.session_id)
    if body.cursor is not None:
        return reply(await _poll(call, body.session_id, session, body.cursor, until))
    return reply(await _poll_remembered(call, body.session_id, session, until))


async def _poll_remembered(call: Call, name: str, session: Session, until: datetime) -> GetOutputResponse:
    """Read on from a stored cursor. Moving it is a compare-and-set, so that concurrent polls share the output."""
    path = cursor_path(name, call.principal.user)
    for _ in range(MAX_RACES):
        stored = await call.services.store.get(path)
        position = Cursor.of(stored).offset if stored is not None else 0
        answer = await _poll(call, name, session, position, until)
        if answer.cursor == position or await _move(call, path, stored, answer.cursor, session):
            return answer
    raise Conflict("too many polls at the same time")


async def _move(call: Call, path: str, stored: Snapshot | None, offset: int, session: Session) -> bool:
    cursor = Cursor(offset=offset, expire_at=session.expire_at).fields()
    try:
        if stored is None:
            await call.services.store.create(path, cursor)
        else:
            await call.services.store.update(path, cursor, expect=stored.version)
    except (AlreadyExists, Conflict):
        return False
    return True


async def _poll(call: Call, name: str, session: Session, position: int, until: datetime) -> GetOutputResponse:
    clock = call.services.clock
    while True:
        answer, seen = await _read(call, name, session, position)
        remaining = (until - clock.now()).total_seconds()
        if answer.output or answer.ended or remaining <= 0:
            return answer
        await within(clock, remaining, _news(call, name, seen))
        session = await visible_session(call, name)


async def _news(call: Call, name: str, seen: str) -> None:
    """Return when there is a chunk after the one of id `seen`, or the session has ended."""
    store = call.services.store
    chunks = store.follow(chunks_of(session_path(name)), after=seen, limit=1)
    news = merge(chunks, store.watch(session_path(name)), departure(call.request))
    await first(news, lambda item: item[0] == 0 or _is_over(item[1]))


def _is_over(snapshot: Snapshot | None) -> bool:
    return snapshot is None or Session.of(snapshot).state in ENDED


async def _read(call: Call, name: str, session: Session, position: int) -> tuple[GetOutputResponse, str]:
    """One look, and the id of the last chunk seen. The session was read before its chunks: if it had ended by then,
    no chunk comes after them."""
    tape = Tape(call.services.store, session_path(name), position)
    pieces, complete = await tape.read(MAX_POLL_BYTES)
    if complete and session.state in ENDED:
        final = await final_offset(call.services.store, name, session)
        if position > final:
            raise Malformed(f"cursor: the transcript has ended at {final}")
        pieces += tape.finish(final)
    pieces, uncut = cut(pieces, MAX_POLL_BYTES)
    ended = complete and uncut and session.state in ENDED
    output, cursor = as_text(pieces, position, ended=ended)
    return GetOutputResponse(output=output, cursor=cursor, ended=ended), tape.last_id
