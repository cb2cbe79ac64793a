"""Submitting and listing commands."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, TypeAdapter
from starlette.responses import Response

from producers.intake import Call, open_session, read_body, reply, request_id, validated, visible_session
from producers.publishing import publish
from producers.sessions import DEFAULT_PAGE, PAGE_SIZE
from producers.status import command_status
from schemas.documents import Command, commands_of
from schemas.errors import TooLarge
from schemas.events import CommandSubmitted
from schemas.http import ExecuteCommandRequest, ExecuteCommandResponse, ListCommandsResponse
from schemas.limits import MAX_COMMAND_BYTES
from schemas.ports import Query, Where

NUMBER: TypeAdapter[int] = TypeAdapter(Annotated[int, Field(ge=0, lt=10**15)])


async def execute_command(call: Call) -> Response:
    """Submit a command. Repeating the request with the same commandId answers the same and starts nothing more."""
    body = await read_body(call, ExecuteCommandRequest)
    if len(body.command.encode()) > MAX_COMMAND_BYTES:
        raise TooLarge(f"a command has at most {MAX_COMMAND_BYTES} bytes of UTF-8; put longer ones into a file")
    command_id = request_id(call, body.command_id)
    submitted = {"commandId": command_id, "text": body.command, "timeoutSeconds": body.timeout_seconds}
    event = validated(CommandSubmitted, submitted)
    await open_session(call, body.session_id)
    await publish(call, event, session=body.session_id, name=f"command-{command_id}")
    return reply(ExecuteCommandResponse(command_id=command_id, command=body.command), status=202)


async def list_commands(call: Call) -> Response:
    """A session's commands in the order of their numbers, from after a number on."""
    name = call.last_segment
    after = call.query("after", NUMBER, 0)
    limit = call.query("limit", PAGE_SIZE, DEFAULT_PAGE)
    await visible_session(call, name)
    query = Query(commands_of(name), where=(Where("number", ">=", after + 1),), order_by="number", limit=limit)
    found = await call.services.store.query(query)
    return reply(ListCommandsResponse(commands=tuple(command_status(item.id, Command.of(item)) for item in found)))
