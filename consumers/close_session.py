"""session.closed: step to closing and stop the shell; the tender drains and finishes."""

from __future__ import annotations

import logging
from datetime import timedelta

from consumers.admission import admit, end_unstarted
from consumers.commands import settle_left
from consumers.context import Context
from consumers.sessions import change, load, sign_of_use
from consumers.settlement import DONE, Refuse, Settlement
from schemas.documents import Session
from schemas.errors import AgentRefused, SandboxGone, Unavailable
from schemas.events import CloseReason
from schemas.lifecycle import SessionState

log = logging.getLogger(__name__)


async def close_session(context: Context, session_id: str, reason: CloseReason) -> Settlement:
    """Begin the end. A session without a sandbox ends at once; one that came back to life is not closed as idle."""
    current = await load(context, session_id)
    if current is None:
        return Refuse("unknown_session", "no document of this session")
    if not current.session.live:
        await settle_left(context, session_id, current.session.state, current.session.reason)
        return DONE
    if reason is CloseReason.IDLE and not idle(context, current.session):
        return DONE
    if not current.session.pod_uid:
        await close_unstarted(context, session_id, reason.value)
        return DONE
    if reason is CloseReason.IDLE and await _used(context, session_id, current.session):
        return DONE
    closing = await change(context, session_id, lambda session: _close(context, session, reason))
    if closing is None:  # an earlier delivery may have died before it stopped the shell
        current = await load(context, session_id)
        if current is not None and current.session.live and not current.session.pod_uid:  # back in the queue just now
            await close_unstarted(context, session_id, reason.value)
            return DONE
        closing = current.session if current is not None and current.session.state is SessionState.CLOSING else None
    if closing is not None:
        await (_stop_shell if closing.agent_boot_id else _delete_sandbox)(context, session_id, closing)
    return DONE


def idle(context: Context, session: Session) -> bool:
    """Whether the session is ready and has not been used for the whole idle time-out, after a warning."""
    unused = context.now() - session.last_activity_at
    return session.state is SessionState.READY and session.warning is not None and unused >= context.limits.idle_timeout


async def close_unstarted(context: Context, session_id: str, reason: str) -> None:
    """End a session that has no sandbox; one that is being created for it is deleted by its creator."""
    await end_unstarted(context, session_id, SessionState.CLOSED, reason)
    await admit(context)


async def _used(context: Context, session_id: str, session: Session) -> bool:
    """Whether the session was used after all: its tender hears that seconds late, and signs it later still."""
    try:
        control = await context.controls.get(session_id, session)
        status = await control.request("status")
    except (SandboxGone, Unavailable, AgentRefused):
        return False
    unused = timedelta(0) if status["busy"] else timedelta(seconds=status["lastInputSeconds"])
    if unused >= context.limits.idle_timeout:
        return False
    activity = context.now() - unused
    return await change(context, session_id, lambda now: sign_of_use(context, now, activity)) is not None


def _close(context: Context, session: Session, reason: CloseReason) -> dict[str, object] | None:
    if session.state not in (SessionState.STARTING, SessionState.READY):
        return None
    if reason is CloseReason.IDLE and not idle(context, session):
        return None
    return {
        "state": SessionState.CLOSING,
        "reason": reason.value,
        "warning": None,
        "deadline": context.now() + context.limits.closing_grace,
    }


async def _stop_shell(context: Context, session_id: str, session: Session) -> None:
    try:
        control = await context.controls.get(session_id, session)
        await control.request("stop")
    except (SandboxGone, Unavailable, AgentRefused) as error:
        log.info("session %s cannot be asked to stop, its tender or the sweep ends it: %s", session_id, error)


async def _delete_sandbox(context: Context, session_id: str, session: Session) -> None:
    """No shell of this session is in use, and a cluster may not have found a place for its sandbox yet."""
    try:
        await context.sandboxes.delete(session.pod_name, session.pod_uid)
    except Unavailable as error:
        log.info("session %s: its sandbox is deleted by its tender or the sweep: %s", session_id, error)
