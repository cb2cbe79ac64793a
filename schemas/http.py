"""Bodies of the HTTP functions, in camelCase, as an existing frontend sends and reads them.

`userId` and `podName` of a request are never read: whoever calls is who the token says.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from schemas.documents import ChangedFile
from schemas.events import ClientId, Cols, Rows, Signal, Usage, WorkspacePath
from schemas.lifecycle import CommandState, SessionState
from schemas.limits import MAX_COMMAND_TIMEOUT_SECONDS
from schemas.model import Base64, Model

Offset = Annotated[int, Field(ge=0, lt=10**15)]
"""An offset of a transcript, in bytes; chunk ids have room for no more digits."""


class CreateSessionRequest(Model):
    """`request_id` (or the Idempotency-Key header) makes a repeated request find the same session; `reconnect` asks
    for the newest live session of the caller, if there is one."""

    request_id: ClientId | None = None
    reconnect: bool = False
    rows: Rows = 24
    cols: Cols = 80
    image: Annotated[str, Field(max_length=512)] = ""


class CreateSessionResponse(Model):
    """`pod_name` is for display only."""

    session_id: str
    pod_name: str
    status: SessionState


class ExecuteCommandRequest(Model):
    """`command_id` is the idempotency key: the same one never starts twice, and its first text counts."""

    session_id: str
    command: str
    command_id: ClientId | None = None
    timeout_seconds: Annotated[int, Field(ge=1, le=MAX_COMMAND_TIMEOUT_SECONDS)] | None = None


class ExecuteCommandResponse(Model):
    """The command is on its way; its output comes with the transcript, so `output` is always empty."""

    success: Literal[True] = True
    command_id: str
    command: str
    output: Literal[""] = ""


class SessionStatus(Model):
    """A session as its owner sees it. `status` repeats `state` for old clients.

    `reason` says in plain words why the session is in this state, `position` counts from 1 in the queue, `warning`
    is the moment at which it will be closed for idleness, `final_offset` the length of a complete transcript.
    """

    session_id: str
    status: SessionState
    state: SessionState
    reason: str
    pod_name: str
    position: int | None
    warning: datetime | None
    rows: int
    cols: int
    created_at: datetime
    ready_at: datetime | None
    last_activity_at: datetime
    expires_at: datetime
    ended_at: datetime | None
    final_offset: int | None
    usage: Usage


class ListSessionsResponse(Model):
    """The caller's sessions, newest first."""

    sessions: tuple[SessionStatus, ...]


class CommandStatus(Model):
    """A command as its owner sees it. Offsets are of the transcript; `end_offset` is None until it ended."""

    command_id: str
    number: int
    command: str
    state: CommandState
    reason: str
    exit_code: int | None
    cwd: str
    start_offset: int | None
    end_offset: int | None
    seconds: float | None
    changed_files: tuple[ChangedFile, ...]
    changed_files_truncated: bool
    submitted_at: datetime
    ended_at: datetime | None


class ListCommandsResponse(Model):
    """Commands in the order of their numbers."""

    commands: tuple[CommandStatus, ...]


class GetOutputRequest(Model):
    """`cursor` is what the last answer said; without one the server remembers where this caller was.

    `wait` is how many seconds to wait for something new, at most MAX_LONG_POLL_SECONDS.
    """

    session_id: str
    cursor: Offset | None = None
    wait: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class GetOutputResponse(Model):
    """Text from the old cursor up to `cursor`; `ended` once the whole transcript of an ended session was read."""

    output: str
    cursor: int
    ended: bool


class StreamedData(Model):
    """One message of the event stream: bytes of the transcript from `offset` on; the message's id is their end."""

    offset: int
    data: Base64


class StreamedGap(Model):
    """An event `gap`: bytes that were given up. `length` None: nobody knows how many; nothing follows."""

    offset: int
    length: int | None
    reason: str


class StreamedEnd(Model):
    """The event `end`: the transcript is complete."""

    final_offset: int


class SendInputRequest(Model):
    """Keystrokes: exactly one of `text` and `data` (base64). `request_id` makes a repeated request count once."""

    session_id: str
    text: str | None = None
    data: Base64 | None = None
    request_id: ClientId | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.text is None) == (self.data is None):
            raise ValueError("exactly one of 'text' and 'data' is needed")
        return self


class ResizeRequest(Model):
    """The terminal's new size, in cells."""

    session_id: str
    rows: Rows
    cols: Cols
    request_id: ClientId | None = None


class SignalRequest(Model):
    """A signal for whatever holds the terminal; with `command_id`, that command is cancelled instead."""

    session_id: str
    signal: Annotated[Signal, Field(strict=False)] = Signal.INT
    command_id: ClientId | None = None
    request_id: ClientId | None = None


class AcceptedResponse(Model):
    """The event is on its way."""

    success: Literal[True] = True


class FileEntry(Model):
    """One file, directory or deletion; `content` is text or base64 as `encoding` says, `mode` permission bits."""

    path: WorkspacePath
    type: Literal["file", "directory", "delete"] = "file"
    content: str = ""
    encoding: Literal["utf-8", "base64"] = "utf-8"
    mode: Annotated[int, Field(ge=0, le=0o777)] = 0o644


class SyncFilesRequest(Model):
    """What to write into the workspace, in this order."""

    session_id: str
    file_structure: Annotated[tuple[FileEntry, ...], Field(strict=False, fail_fast=True)]
    request_id: ClientId | None = None


class SyncFilesResponse(Model):
    """`pending`: the files will be written, but were not when the answer was due."""

    success: Literal[True] = True
    transfer_id: str
    files: int
    pending: bool


class ListedFile(Model):
    """One entry of a listing; `size` in bytes, `modified` in seconds since 1970."""

    path: str
    type: str
    size: int = 0
    mode: int = 0
    modified: float = 0.0


class ListFilesResponse(Model):
    """Files below a directory, depth first, sorted; `truncated` if there are more. Also what a listing's transfer
    holds, as JSON."""

    files: Annotated[tuple[ListedFile, ...], Field(strict=False)]
    truncated: bool = False


class ReadFileResponse(Model):
    """A file's content as text, or as base64 where it is no UTF-8."""

    path: str
    content: str
    encoding: Literal["utf-8", "base64"]
    size: int
    mode: int | None


class CleanupSessionResponse(Model):
    """`status` is the session's state at this moment; it is closing if it had not ended."""

    success: Literal[True] = True
    session_id: str
    status: SessionState


class FirestoreTokenResponse(Model):
    """A custom token with which a browser signs in to Firestore as the same user."""

    token: str


class FieldProblem(Model):
    """What is wrong with one field of a request."""

    field: str
    message: str


class Problem(Model):
    """A problem document (RFC 9457). `code` is stable; `retry_after` is in seconds."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    retry_after: int | None = None
    errors: tuple[FieldProblem, ...] | None = None


PROBLEMS: dict[str, tuple[int, str]] = {
    "rejected": (400, "The request cannot succeed as it is"),
    "malformed": (400, "The request is malformed"),
    "malformed_event": (400, "The event is malformed"),
    "bad_path": (400, "The path is not allowed"),
    "unauthenticated": (401, "A valid access token is needed"),
    "forbidden": (403, "Not allowed"),
    "unknown_session": (404, "No such session"),
    "not_found": (404, "Not found"),
    "method_not_allowed": (405, "Method not allowed"),
    "session_ended": (409, "The session has ended"),
    "illegal_step": (409, "Not possible in this state"),
    "already_exists": (409, "It exists already"),
    "not_a_file": (409, "Not a file"),
    "not_a_directory": (409, "Not a directory"),
    "no_space": (409, "The workspace is full"),
    "sandbox_gone": (409, "The sandbox is gone"),
    "too_large": (413, "Too large"),
    "unsupported_media_type": (415, "Unsupported media type"),
    "limit_reached": (429, "A limit is reached"),
    "internal": (500, "Internal error"),
    "diverged": (500, "The transcript is inconsistent"),
    "sandbox_failed": (500, "The sandbox could not be started"),
    "not_offered": (501, "This deployment does not offer it"),
    "unavailable": (503, "Not available right now"),
    "store_unavailable": (503, "Not available right now"),
    "bus_unavailable": (503, "Not available right now"),
    "agent_unreachable": (503, "The sandbox does not answer right now"),
    "no_capacity": (503, "No room right now"),
    "conflict": (503, "Somebody else wrote first"),
    "superseded": (503, "Somebody else took over"),
    "not_ready": (503, "The session is not ready yet"),
    "transfer_pending": (503, "The transfer takes longer than usual"),
}
"""Every code a problem document can have: its HTTP status and title."""

REFUSED_BY_SANDBOX = (409, "Refused by the sandbox")
"""For codes of the sandbox's agent that are not in PROBLEMS."""


def problem(code: str, detail: str, **members: Any) -> Problem:
    """The problem document of a code; members are `retry_after` and `errors`."""
    status, title = PROBLEMS.get(code, REFUSED_BY_SANDBOX)
    return Problem(
        type=f"urn:problem-type:pigeon:{code}", title=title, status=status, detail=detail, code=code, **members
    )
