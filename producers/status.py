"""Stored documents as their owner sees them."""

from __future__ import annotations

from schemas.documents import Command, Session
from schemas.http import CommandStatus, SessionStatus
from schemas.ids import SessionId, sandbox_name
from schemas.lifecycle import SessionState

STATE_WORDS = {
    SessionState.REQUESTED: "The session was asked for; a worker will take it up in a moment.",
    SessionState.QUEUED: "All sandboxes are in use; the session waits for its turn.",
    SessionState.STARTING: "The sandbox is starting.",
    SessionState.READY: "",
    SessionState.CLOSING: "The session is being closed.",
    SessionState.CLOSED: "The session is closed.",
    SessionState.FAILED: "The session could not be started.",
    SessionState.LOST: "The sandbox was lost.",
}
REASON_WORDS = {
    "user": "Its owner closed it.",
    "idle": "Nothing happened in it for too long.",
    "expired": "It reached its longest life.",
    "admin": "An administrator closed it.",
}


def session_status(session_id: str, session: Session) -> SessionStatus:
    """A session's public state."""
    return SessionStatus(
        session_id=session_id,
        status=session.state,
        state=session.state,
        reason=_reason(session),
        pod_name=pod_name(session_id, session),
        position=session.position if session.state is SessionState.QUEUED else None,
        warning=session.warning,
        rows=session.rows,
        cols=session.cols,
        created_at=session.created_at,
        ready_at=session.ready_at,
        last_activity_at=session.last_activity_at,
        expires_at=session.expires_at,
        ended_at=session.ended_at,
        final_offset=session.final_offset,
        usage=session.usage,
    )


def pod_name(session_id: str, session: Session) -> str:
    """The session's pod, or the name it is going to have unless it takes one from the pool."""
    return session.pod_name or sandbox_name(SessionId(session_id))


def _reason(session: Session) -> str:
    words = STATE_WORDS[session.state]
    if session.state is SessionState.QUEUED and session.position is not None:
        words = f"{words} Position {session.position}."
    if not session.reason:
        return words
    return f"{words} {REASON_WORDS.get(session.reason, session.reason)}".strip()


def command_status(command_id: str, command: Command) -> CommandStatus:
    """A command's public state."""
    return CommandStatus(
        command_id=command_id,
        number=command.number,
        command=command.text,
        state=command.state,
        reason=command.reason,
        exit_code=command.exit_code,
        cwd=command.cwd,
        start_offset=command.start_offset,
        end_offset=command.end_offset,
        seconds=command.seconds,
        changed_files=command.changed_files,
        changed_files_truncated=command.changed_files_truncated,
        submitted_at=command.submitted_at,
        ended_at=command.ended_at,
    )
