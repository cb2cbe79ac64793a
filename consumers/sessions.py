"""Changes to session documents: by precondition, checked against the lifecycle, retried after a lost race."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from consumers.context import Context
from schemas.documents import Session, User, plain, session_path, user_path
from schemas.errors import Conflict, NotFound, Unavailable
from schemas.events import SessionEnded
from schemas.lifecycle import ENDED, LIVE, SessionState, check_session_step
from schemas.ports import Snapshot, Transaction

MAX_RETRIES = 20  # of one compare-and-set; each loss means that another writer got through

Change = dict[str, Any]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Held:
    """A session as it was read, with the version that a precondition names."""

    id: str
    session: Session
    version: str


def held(snapshot: Snapshot) -> Held:
    """Read a snapshot of a session."""
    return Held(snapshot.id, Session.of(snapshot), snapshot.version)


def readable(page: Iterable[Snapshot]) -> list[Held]:
    """Read a page of sessions; one that this version cannot read is left out, so that it harms no other."""
    sessions = []
    for snapshot in page:
        try:
            sessions.append(held(snapshot))
        except ValidationError as error:
            log.error("session %s cannot be read: %s", snapshot.id, error)
    return sessions


async def load(context: Context, session_id: str) -> Held | None:
    """The session now, or None."""
    snapshot = await context.store.get(session_path(session_id))
    return None if snapshot is None else held(snapshot)


async def change(context: Context, session_id: str, decide: Callable[[Session], Change | None]) -> Session | None:
    """Apply what `decide` makes of the session's present state; returns the session as written.

    `decide` may be asked again when somebody else wrote first; None from it, or no such session, means that nothing
    is written and None is returned. Raises IllegalStep for a step that the lifecycle does not have, Conflict when
    contention did not end.
    """
    for _ in range(MAX_RETRIES):
        current = await load(context, session_id)
        if current is None:
            return None
        fields = decide(current.session)
        if fields is None:
            return None
        try:
            return await write(context, current, fields)
        except Conflict:
            continue
        except NotFound:
            return None
    raise Conflict(f"session {session_id} was written by others {MAX_RETRIES} times in a row")


async def write(context: Context, current: Held, fields: Change) -> Session:
    """Write snake_case `fields` if the document is still as it was read. Raises Conflict, IllegalStep, NotFound."""
    changed = _changed(current.session, fields)
    stored = changed.fields()
    names = {alias_of(name) for name in fields} | ({"live"} if "state" in fields else set())
    await context.store.update(session_path(current.id), {name: stored[name] for name in names}, expect=current.version)
    return changed


def alias_of(name: str) -> str:
    """The stored name of a field of Session."""
    return Session.model_fields[name].alias or name


def _changed(session: Session, fields: Change) -> Session:
    state = fields.get("state", session.state)
    if state is not session.state:
        check_session_step(session.state, state)
    return session.model_copy(update={**fields, "live": state not in ENDED})


def sign_of_use(context: Context, session: Session, activity: datetime) -> Change | None:
    """What a ready session that was last used at `activity` changes, if that is news: no warning, a later deadline."""
    if session.state is not SessionState.READY or activity <= session.last_activity_at:
        return None
    return {"last_activity_at": activity, "warning": None, "deadline": idle_deadline(context, session, activity)}


def idle_deadline(context: Context, session: Session, activity: datetime) -> datetime:
    """When the sweep must look at a session that is not used after `activity`."""
    limits = context.limits
    return min(activity + limits.idle_timeout - limits.idle_warning, session.expires_at)


async def end(
    context: Context,
    session_id: str,
    state: SessionState,
    reason: str,
    *,
    only: frozenset[SessionState] = LIVE,
    **fields: Any,
) -> bool:
    """Step to an end state and give the user's place back, in one transaction; then say so on session-lifecycle.

    Returns False where the session is missing or is in none of the states `only`; nothing is changed then. A worker
    that dies before it has said so leaves the deadline, at which the sweep says it.
    """

    async def work(transaction: Transaction) -> Session | None:
        snapshot = await transaction.get(session_path(session_id))
        if snapshot is None:
            return None
        session = Session.of(snapshot)
        if session.state not in only:
            return None
        user = await transaction.get(user_path(session.user_id))
        ended = _ended(context, session, state, reason, fields)
        transaction.update(session_path(session_id), _difference(session, ended))
        if user is not None:
            count = max(0, User.of(user).live_sessions - 1)
            transaction.update(user_path(session.user_id), {"liveSessions": count})
        return ended

    ended = await context.store.transact(work)
    if ended is None:
        return False
    try:
        await say_ended(context, session_id, ended)
    except Unavailable as error:
        log.warning("session %s: its end is told of later: %s", session_id, error)
    return True


async def say_ended(context: Context, session_id: str, session: Session) -> None:
    """Publish session.ended and note that it is said; saying it twice is harmless, its event id is the same."""
    await context.publish(_farewell(session), session_id, id=f"{session_id}-ended")
    await context.store.update(session_path(session_id), {alias_of("deadline"): None})


def _ended(context: Context, session: Session, state: SessionState, reason: str, fields: Change) -> Session:
    now = context.now()
    cleared = {"tended_at": None, "warning": None, "position": None, "deadline": now + context.limits.request_timeout}
    return _changed(session, {**cleared, "ended_at": now, **fields, "state": state, "reason": reason})


def _difference(old: Session, new: Session) -> Change:
    before, after = old.fields(), new.fields()
    return plain({name: value for name, value in after.items() if before[name] != value})


def _farewell(session: Session) -> SessionEnded:
    assert session.ended_at is not None
    return SessionEnded(
        user_id=session.user_id,
        state=session.state.value,
        reason=session.reason,
        seconds=(session.ended_at - session.created_at).total_seconds(),
        usage=session.usage,
    )


def sentence(error: Exception) -> str:
    """An error's message as a session's reason: a sentence for its user."""
    text = str(error) or type(error).__name__
    return text[0].upper() + text[1:] + ("" if text.endswith((".", "!")) else ".")
