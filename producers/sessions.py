"""Creating, finding, listing and ending sessions."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import Annotated

from pydantic import AwareDatetime, Field, TypeAdapter
from starlette.responses import Response

from producers.intake import Call, read_body, reply, request_id, visible_session
from producers.publishing import publish
from producers.status import pod_name, session_status
from schemas.documents import Session, User, session_path, user_path
from schemas.errors import BusUnavailable, LimitReached, Malformed
from schemas.events import CloseReason, SessionClosed, SessionRequested
from schemas.http import CleanupSessionResponse, CreateSessionRequest, CreateSessionResponse, ListSessionsResponse
from schemas.ids import SessionId, UserId, session_id
from schemas.lifecycle import ENDED, TAKES_INPUT, SessionState
from schemas.limits import Limits
from schemas.ports import Query, Snapshot, Transaction, Where

logger = logging.getLogger(__name__)

PAGE_SIZE: TypeAdapter[int] = TypeAdapter(Annotated[int, Field(ge=1, le=100)])
DEFAULT_PAGE = 20
LIVE_ONLY: TypeAdapter[bool] = TypeAdapter(bool)
MOMENT: TypeAdapter[datetime | None] = TypeAdapter(
    Annotated[AwareDatetime, Field(gt=datetime(1970, 1, 1, tzinfo=UTC), lt=datetime(3000, 1, 1, tzinfo=UTC))] | None
)


async def create_session(call: Call) -> Response:
    """Record a session and ask for it; a repeated request id finds the session it made.

    Once the session is recorded the answer is 202, even if the bus is away: the sweep asks again.
    """
    body = await read_body(call, CreateSessionRequest)
    if body.image not in call.services.images:
        raise Malformed("image: not on the allow-list")
    if body.reconnect:
        found = await _newest_open(call)
        if found is not None:
            return _created(found.id, Session.of(found))
    name = session_id(UserId(call.principal.user), request_id(call, body.request_id))
    session = await _record(call, name, _requested(call, body))
    if session.state is SessionState.REQUESTED:
        await _ask_for(call, name, session)
    return _created(name, session)


def _created(name: str, session: Session) -> Response:
    answer = CreateSessionResponse(session_id=name, pod_name=pod_name(name, session), status=session.state)
    return reply(answer, status=202)


async def _newest_open(call: Call) -> Snapshot | None:
    mine = (Where("userId", "==", call.principal.user), Where("live", "==", True))
    query = Query("sessions", where=mine, order_by="createdAt", descending=True, limit=DEFAULT_PAGE)
    live = await call.services.store.query(query)
    return next((snapshot for snapshot in live if Session.of(snapshot).state in TAKES_INPUT), None)


def _requested(call: Call, body: CreateSessionRequest) -> Session:
    now, limits = call.services.clock.now(), call.services.limits
    expires_at = now + limits.session_lifetime
    return Session(
        user_id=call.principal.user,
        state=SessionState.REQUESTED,
        live=True,
        image=body.image,
        rows=body.rows,
        cols=body.cols,
        created_at=now,
        last_activity_at=now,
        deadline=now + limits.request_timeout,
        expires_at=expires_at,
        expire_at=expires_at + limits.retention,
    )


async def _record(call: Call, name: SessionId, session: Session) -> Session:
    """Write the session and count it, together; returns what is recorded. Raises LimitReached."""

    async def work(transaction: Transaction) -> Session:
        existing = await transaction.get(session_path(name))
        if existing is not None:
            return Session.of(existing)
        counted = await transaction.get(user_path(session.user_id))
        user = User.of(counted) if counted is not None else User()
        _check_limit(user, call.services.limits)
        transaction.create(session_path(name), session.fields())
        if counted is None:
            transaction.create(user_path(session.user_id), User(live_sessions=1).fields())
        else:
            transaction.update(user_path(session.user_id), {"liveSessions": user.live_sessions + 1})
        return session

    return await call.services.store.transact(work)


def _check_limit(user: User, limits: Limits) -> None:
    most = limits.sessions_per_user if user.max_sessions is None else user.max_sessions
    if user.live_sessions >= most:
        raise LimitReached(f"at most {most} sessions can live at once; end one, or wait until one ends")


async def _ask_for(call: Call, name: SessionId, session: Session) -> None:
    event = SessionRequested(user_id=session.user_id, rows=session.rows, cols=session.cols, image=session.image)
    try:
        await publish(call, event, session=name, name="requested")
    except BusUnavailable as error:
        logger.warning("session %s is recorded but could not be published; the sweep will: %s", name, error)


async def get_status(call: Call) -> Response:
    """A session's state."""
    session = await visible_session(call, call.last_segment)
    return reply(session_status(call.last_segment, session))


async def list_sessions(call: Call) -> Response:
    """The caller's sessions, newest first: all or the live ones, from the newest or from before a moment on."""
    limit = call.query("limit", PAGE_SIZE, DEFAULT_PAGE)
    before = call.query("before", MOMENT, None)
    where = [Where("userId", "==", call.principal.user)]
    if call.query("live", LIVE_ONLY, False):
        where.append(Where("live", "==", True))
    if before is not None:
        where.append(Where("createdAt", "<=", before - timedelta.resolution))
    query = Query("sessions", where=tuple(where), order_by="createdAt", descending=True, limit=limit)
    found = await call.services.store.query(query)
    return reply(ListSessionsResponse(sessions=tuple(session_status(item.id, Session.of(item)) for item in found)))


async def cleanup_session(call: Call) -> Response:
    """Ask for the end of a session, 202; one that has ended already is 200."""
    name = call.last_segment
    session = await visible_session(call, name)
    if session.state not in ENDED:
        reason = CloseReason.USER if session.user_id == call.principal.user else CloseReason.ADMIN
        await publish(call, SessionClosed(reason=reason), session=name, name=f"closed-{reason}")
    status = 200 if session.state in ENDED else 202
    return reply(CleanupSessionResponse(session_id=name, status=session.state), status=status)
