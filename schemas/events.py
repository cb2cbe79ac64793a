"""Everything that is said on a topic. Frozen, past tense, versioned by type; the session id is the subject of
the envelope, not a field here."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from schemas.ids import CLIENT_ID_PATTERN
from schemas.limits import (
    MAX_COLS,
    MAX_COMMAND_BYTES,
    MAX_COMMAND_TIMEOUT_SECONDS,
    MAX_FILE_BYTES,
    MAX_FILES,
    MAX_INPUT_BYTES,
    MAX_PATH_BYTES,
    MAX_ROWS,
)
from schemas.model import Base64, Model
from schemas.topics import SCHEDULER_TICKS, SESSION_EVENTS, SESSION_LIFECYCLE, SESSION_LINKS

Rows = Annotated[int, Field(ge=1, le=MAX_ROWS)]
Cols = Annotated[int, Field(ge=1, le=MAX_COLS)]


def _client_id(text: str) -> str:
    """It names documents, and Firestore keeps `__.*__` for itself."""
    if text.startswith("__") and text.endswith("__"):
        raise ValueError("an id cannot begin and end with '__'")
    return text


def _command_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("a command cannot contain a NUL character")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError("a command must be valid Unicode: a lone surrogate is not") from error
    if size > MAX_COMMAND_BYTES:
        raise ValueError(f"a command is at most {MAX_COMMAND_BYTES} bytes of UTF-8, this one has {size}")
    return text


def _workspace_path(path: str) -> str:
    """A relative path below the workspace, in its one spelling. The agent checks again, symlinks included."""
    parts = path.split("/")
    try:
        size = len(path.encode())
    except UnicodeEncodeError as error:
        raise ValueError("a path must be valid Unicode: a lone surrogate is not") from error
    if "\0" in path or size > MAX_PATH_BYTES or any(part in ("", ".", "..") for part in parts):
        raise ValueError(
            "a path is relative to the workspace, has no empty, '.' or '..' part and no NUL,"
            f" and at most {MAX_PATH_BYTES} bytes"
        )
    return path


ClientId = Annotated[str, Field(pattern=CLIENT_ID_PATTERN), AfterValidator(_client_id)]
CommandText = Annotated[str, AfterValidator(_command_text)]
WorkspacePath = Annotated[str, AfterValidator(_workspace_path)]


class Event(Model):
    """The data of a CloudEvent. `type` and `topic` belong to the class."""

    type: ClassVar[str]
    topic: ClassVar[str]


class CloseReason(StrEnum):
    """Why a session is closed."""

    USER = "user"
    IDLE = "idle"
    EXPIRED = "expired"
    ADMIN = "admin"


class Signal(StrEnum):
    """What can be sent to the foreground process group; EOF types the terminal's end-of-file character."""

    INT = "INT"
    TERM = "TERM"
    KILL = "KILL"
    QUIT = "QUIT"
    EOF = "EOF"


class SessionRequested(Event):
    """A user asked for a session; its document exists already, in state requested."""

    type = "session.requested.v1"
    topic = SESSION_EVENTS
    user_id: str
    rows: Rows = 24
    cols: Cols = 80
    image: str = ""


class CommandSubmitted(Event):
    """A user submitted a command; `command_id` is its idempotency key."""

    type = "command.submitted.v1"
    topic = SESSION_EVENTS
    command_id: ClientId
    text: CommandText
    timeout_seconds: Annotated[int, Field(ge=1, le=MAX_COMMAND_TIMEOUT_SECONDS)] | None = None


class InputSent(Event):
    """Keystrokes for whatever holds the terminal."""

    type = "input.sent.v1"
    topic = SESSION_EVENTS
    data: Annotated[Base64, Field(max_length=MAX_INPUT_BYTES)]


class TerminalResized(Event):
    """The user's window has a new size, in cells."""

    type = "terminal.resized.v1"
    topic = SESSION_EVENTS
    rows: Rows
    cols: Cols


class SignalSent(Event):
    """A signal for the foreground process group or, with `command_id`, the cancelling of that command."""

    type = "signal.sent.v1"
    topic = SESSION_EVENTS
    signal: Annotated[Signal, Field(strict=False)]
    command_id: ClientId | None = None


class FileItem(Model):
    """One file, directory or deletion of a push. `mode` is the permission bits of a file."""

    path: WorkspacePath
    type: Literal["file", "directory", "delete"] = "file"
    data: Annotated[Base64, Field(max_length=MAX_FILE_BYTES)] = b""
    mode: Annotated[int, Field(ge=0, le=0o777)] = 0o644


class FilesPushed(Event):
    """Files to be written into the workspace, in this order, each atomically."""

    type = "files.pushed.v1"
    topic = SESSION_EVENTS
    items: Annotated[tuple[FileItem, ...], Field(strict=False, min_length=1, max_length=MAX_FILES)]
    transfer_id: ClientId | None = None


class FileRequested(Event):
    """A file's content, or the listing of a directory ("" is the workspace), wanted as a transfer."""

    type = "file.requested.v1"
    topic = SESSION_EVENTS
    path: str
    transfer_id: ClientId
    what: Literal["content", "listing"] = "content"


class SessionClosed(Event):
    """The session is to be closed."""

    type = "session.closed.v1"
    topic = SESSION_EVENTS
    reason: Annotated[CloseReason, Field(strict=False)]


class SessionOpened(Event):
    """The session has a sandbox and wants a tender; held unacknowledged while one tends it."""

    type = "session.opened.v1"
    topic = SESSION_LINKS
    epoch: int = 0


class ClockTicked(Event):
    """A minute has passed."""

    type = "clock.ticked.v1"
    topic = SCHEDULER_TICKS
    at: Annotated[datetime, Field(strict=False)]


class Usage(Model):
    """What a session has used so far. `writes` counts chunk documents."""

    pod_seconds: float = 0.0
    commands: int = 0
    bytes: int = 0
    writes: int = 0


class SessionStarted(Event):
    """The session became ready; `seconds` since it was created."""

    type = "session.started.v1"
    topic = SESSION_LIFECYCLE
    user_id: str
    seconds: float


class SessionEnded(Event):
    """The session reached an end state; `seconds` since it was created."""

    type = "session.ended.v1"
    topic = SESSION_LIFECYCLE
    user_id: str
    state: str
    reason: str
    seconds: float
    usage: Usage


EVENTS: dict[str, type[Event]] = {
    event.type: event
    for event in (
        SessionRequested,
        CommandSubmitted,
        InputSent,
        TerminalResized,
        SignalSent,
        FilesPushed,
        FileRequested,
        SessionClosed,
        SessionOpened,
        ClockTicked,
        SessionStarted,
        SessionEnded,
    )
}
