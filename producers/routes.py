"""The functions by name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from producers.commands import execute_command, list_commands
from producers.endpoint import Work, answer
from producers.files import list_files, read_file, sync_files
from producers.inputs import resize, send_input, send_signal
from producers.output import get_output
from producers.services import Services
from producers.sessions import cleanup_session, create_session, get_status, list_sessions
from producers.streaming import stream_output
from producers.tokens import firestore_token
from schemas.functions import FUNCTIONS

Handler = Callable[[Request], Awaitable[Response]]

WORK: dict[str, Work] = {
    "terminal-create-session": create_session,
    "terminal-execute-command": execute_command,
    "terminal-get-status": get_status,
    "terminal-list-sessions": list_sessions,
    "terminal-list-commands": list_commands,
    "terminal-get-output": get_output,
    "terminal-stream-output": stream_output,
    "terminal-send-input": send_input,
    "terminal-resize": resize,
    "terminal-signal": send_signal,
    "terminal-sync-files": sync_files,
    "terminal-list-files": list_files,
    "terminal-read-file": read_file,
    "terminal-cleanup-session": cleanup_session,
    "terminal-firestore-token": firestore_token,
}


def routes(services: Services) -> dict[str, Handler]:
    """A handler for each function, for every method and for both /NAME and /NAME/ID.

    A handler answers wrong methods, preflights and errors itself. `schemas.functions.FUNCTIONS` names the methods.
    """
    return {name: partial(answer, services, FUNCTIONS[name], work) for name, work in WORK.items()}
