"""The HTTP functions, declared once: the routes, the OpenAPI document and the tests read this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from schemas.http import (
    AcceptedResponse,
    CleanupSessionResponse,
    CreateSessionRequest,
    CreateSessionResponse,
    ExecuteCommandRequest,
    ExecuteCommandResponse,
    FirestoreTokenResponse,
    GetOutputRequest,
    GetOutputResponse,
    ListCommandsResponse,
    ListFilesResponse,
    ListSessionsResponse,
    ReadFileResponse,
    ResizeRequest,
    SendInputRequest,
    SessionStatus,
    SignalRequest,
    SyncFilesRequest,
    SyncFilesResponse,
)
from schemas.model import Model


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter besides the body; `schema` is its JSON Schema."""

    name: str
    description: str
    schema: dict[str, Any]
    where: Literal["query", "header", "path"] = "query"
    required: bool = False


@dataclass(frozen=True, slots=True)
class Function:
    """One deployable function. `responses` maps a status to the model of its body."""

    name: str
    method: Literal["GET", "POST", "DELETE"]
    summary: str
    responses: dict[int, type[Model]]
    request: type[Model] | None = None
    by_session: bool = False  # the path's last segment is a session id
    parameters: tuple[Parameter, ...] = ()
    media_types: tuple[str, ...] = ("application/json",)  # of the answer
    problems: tuple[int, ...] = ()  # statuses besides those that every function has

    @property
    def target(self) -> str:
        """The name of the function-framework's target, a Python identifier."""
        return self.name.replace("-", "_")


ANY_PROBLEM = (401, 403, 405, 500, 503)

_INTEGER = {"type": "integer", "minimum": 0, "maximum": 10**15 - 1}
_LIMIT = Parameter("limit", "How many at the most.", {"type": "integer", "minimum": 1, "maximum": 100})
_IDEMPOTENCY_KEY = Parameter(
    "Idempotency-Key", "Does what requestId does.", {"type": "string", "maxLength": 64}, where="header"
)

FUNCTIONS: dict[str, Function] = {
    function.name: function
    for function in (
        Function(
            "terminal-create-session",
            "POST",
            "Create a session, or find the caller's live one.",
            {202: CreateSessionResponse},
            request=CreateSessionRequest,
            parameters=(_IDEMPOTENCY_KEY,),
            problems=(400, 413, 415, 429),
        ),
        Function(
            "terminal-execute-command",
            "POST",
            "Submit a command; the same commandId starts at most once.",
            {202: ExecuteCommandResponse},
            request=ExecuteCommandRequest,
            parameters=(_IDEMPOTENCY_KEY,),
            problems=(400, 404, 409, 413, 415),
        ),
        Function(
            "terminal-get-status",
            "GET",
            "A session's state, in words and figures.",
            {200: SessionStatus},
            by_session=True,
            problems=(404,),
        ),
        Function(
            "terminal-list-sessions",
            "GET",
            "The caller's sessions, newest first.",
            {200: ListSessionsResponse},
            parameters=(
                Parameter("live", "Only sessions that have not ended.", {"type": "boolean"}),
                Parameter(
                    "before",
                    "Only sessions created before that moment: the last one's `createdAt` gives the next page.",
                    {"type": "string", "format": "date-time"},
                ),
                _LIMIT,
            ),
            problems=(400,),
        ),
        Function(
            "terminal-list-commands",
            "GET",
            "A session's commands, by number.",
            {200: ListCommandsResponse},
            by_session=True,
            parameters=(Parameter("after", "Only commands with a greater number.", _INTEGER), _LIMIT),
            problems=(400, 404),
        ),
        Function(
            "terminal-get-output",
            "POST",
            "The transcript as text, from a cursor on.",
            {200: GetOutputResponse},
            request=GetOutputRequest,
            problems=(400, 404, 413, 415),
        ),
        Function(
            "terminal-stream-output",
            "GET",
            "The transcript as server-sent events: messages (StreamedData), gap, state (SessionStatus), end.",
            {200: Model},
            by_session=True,
            parameters=(
                Parameter("from", "The offset to start at.", _INTEGER),
                Parameter("Last-Event-ID", "As `from`, and wins over it.", _INTEGER, where="header"),
            ),
            media_types=("text/event-stream",),
            problems=(400, 404),
        ),
        Function(
            "terminal-send-input",
            "POST",
            "Type something.",
            {202: AcceptedResponse},
            request=SendInputRequest,
            parameters=(_IDEMPOTENCY_KEY,),
            problems=(400, 404, 409, 413, 415),
        ),
        Function(
            "terminal-resize",
            "POST",
            "Change the terminal's size.",
            {202: AcceptedResponse},
            request=ResizeRequest,
            parameters=(_IDEMPOTENCY_KEY,),
            problems=(400, 404, 409, 413, 415),
        ),
        Function(
            "terminal-signal",
            "POST",
            "Send a signal, or cancel a command.",
            {202: AcceptedResponse},
            request=SignalRequest,
            parameters=(_IDEMPOTENCY_KEY,),
            problems=(400, 404, 409, 413, 415),
        ),
        Function(
            "terminal-sync-files",
            "POST",
            "Write files into the workspace.",
            {200: SyncFilesResponse, 202: SyncFilesResponse},
            request=SyncFilesRequest,
            parameters=(_IDEMPOTENCY_KEY,),
            problems=(400, 404, 409, 413, 415),
        ),
        Function(
            "terminal-list-files",
            "GET",
            "The files below a directory of the workspace.",
            {200: ListFilesResponse},
            by_session=True,
            parameters=(Parameter("path", "The directory; the workspace if missing.", {"type": "string"}),),
            problems=(400, 404, 409),
        ),
        Function(
            "terminal-read-file",
            "GET",
            "A file of the workspace, as JSON or, if the Accept header says so, as it is.",
            {200: ReadFileResponse},
            by_session=True,
            parameters=(Parameter("path", "The file.", {"type": "string"}, required=True),),
            media_types=("application/json", "application/octet-stream"),
            problems=(400, 404, 409, 413),
        ),
        Function(
            "terminal-cleanup-session",
            "DELETE",
            "End a session.",
            {200: CleanupSessionResponse, 202: CleanupSessionResponse},
            by_session=True,
            problems=(404,),
        ),
        Function(
            "terminal-firestore-token",
            "POST",
            "A token with which the browser listens to Firestore directly.",
            {200: FirestoreTokenResponse},
            problems=(501,),
        ),
    )
}
