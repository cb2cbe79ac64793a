"""The deployable functions, each a target of its own:
`functions-framework --asgi --source producers/main.py --target terminal_create_session`."""

from __future__ import annotations

import functions_framework.aio
from starlette.requests import Request
from starlette.responses import Response

from infra.wiring import producer_services
from producers.endpoint import answer
from producers.problems import problem_response
from producers.routes import WORK
from schemas.functions import FUNCTIONS


def _target(name: str) -> functions_framework.aio.HTTPFunction:
    """The function of that name; its services are built at its first request."""

    async def target(request: Request) -> Response:
        try:
            services = await producer_services()
        except Exception as error:
            return problem_response(error)
        return await answer(services, FUNCTIONS[name], WORK[name], request)

    target.__name__ = FUNCTIONS[name].target
    return functions_framework.aio.http(target)


terminal_create_session = _target("terminal-create-session")
terminal_execute_command = _target("terminal-execute-command")
terminal_get_status = _target("terminal-get-status")
terminal_list_sessions = _target("terminal-list-sessions")
terminal_list_commands = _target("terminal-list-commands")
terminal_get_output = _target("terminal-get-output")
terminal_stream_output = _target("terminal-stream-output")
terminal_send_input = _target("terminal-send-input")
terminal_resize = _target("terminal-resize")
terminal_signal = _target("terminal-signal")
terminal_sync_files = _target("terminal-sync-files")
terminal_list_files = _target("terminal-list-files")
terminal_read_file = _target("terminal-read-file")
terminal_cleanup_session = _target("terminal-cleanup-session")
terminal_firestore_token = _target("terminal-firestore-token")
