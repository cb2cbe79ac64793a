"""Lifecycles are tables; an illegal step raises and changes nothing."""

from __future__ import annotations

from enum import StrEnum

from schemas.errors import IllegalStep


class SessionState(StrEnum):
    """requested -> queued | starting -> ready -> closing -> closed; failed and lost from any live state."""

    REQUESTED = "requested"
    QUEUED = "queued"
    STARTING = "starting"
    READY = "ready"
    CLOSING = "closing"
    CLOSED = "closed"
    FAILED = "failed"
    LOST = "lost"


class CommandState(StrEnum):
    """waiting -> running -> exited | killed | lost; short commands go from waiting straight to their end."""

    WAITING = "waiting"
    RUNNING = "running"
    EXITED = "exited"
    KILLED = "killed"
    LOST = "lost"


_S = SessionState
SESSION_STEPS: dict[SessionState, frozenset[SessionState]] = {
    _S.REQUESTED: frozenset({_S.QUEUED, _S.STARTING, _S.CLOSED, _S.FAILED, _S.LOST}),
    _S.QUEUED: frozenset({_S.STARTING, _S.CLOSED, _S.FAILED, _S.LOST}),
    _S.STARTING: frozenset({_S.QUEUED, _S.READY, _S.CLOSING, _S.CLOSED, _S.FAILED, _S.LOST}),
    _S.READY: frozenset({_S.CLOSING, _S.FAILED, _S.LOST}),
    _S.CLOSING: frozenset({_S.CLOSED, _S.FAILED, _S.LOST}),
    _S.CLOSED: frozenset(),
    _S.FAILED: frozenset(),
    _S.LOST: frozenset(),
}

_C = CommandState
COMMAND_STEPS: dict[CommandState, frozenset[CommandState]] = {
    _C.WAITING: frozenset({_C.RUNNING, _C.EXITED, _C.KILLED, _C.LOST}),
    _C.RUNNING: frozenset({_C.EXITED, _C.KILLED, _C.LOST}),
    _C.EXITED: frozenset(),
    _C.KILLED: frozenset(),
    _C.LOST: frozenset(),
}

LIVE = frozenset(state for state, steps in SESSION_STEPS.items() if steps)
ENDED = frozenset(SessionState) - LIVE
TAKES_INPUT = LIVE - {SessionState.CLOSING}
UNSETTLED = frozenset(state for state, steps in COMMAND_STEPS.items() if steps)


def check_session_step(old: SessionState, new: SessionState) -> None:
    """Raises IllegalStep unless the table has this step."""
    if new not in SESSION_STEPS[old]:
        raise IllegalStep(f"a session cannot go from {old} to {new}")


def check_command_step(old: CommandState, new: CommandState) -> None:
    """Raises IllegalStep unless the table has this step."""
    if new not in COMMAND_STEPS[old]:
        raise IllegalStep(f"a command cannot go from {old} to {new}")
