"""Keystrokes, the terminal's size, and signals."""

from __future__ import annotations

from starlette.responses import Response

from producers.intake import Call, open_session, read_body, reply, request_id
from producers.publishing import publish
from schemas.errors import TooLarge
from schemas.events import Event, InputSent, SignalSent, TerminalResized
from schemas.http import AcceptedResponse, ResizeRequest, SendInputRequest, SignalRequest
from schemas.limits import MAX_INPUT_BYTES


async def send_input(call: Call) -> Response:
    """Type something."""
    body = await read_body(call, SendInputRequest)
    data = body.data if body.text is None else body.text.encode()
    assert data is not None  # the model has exactly one of both
    if len(data) > MAX_INPUT_BYTES:
        raise TooLarge(f"one input has at most {MAX_INPUT_BYTES} bytes; send several")
    return await _send(call, body, InputSent(data=data), "input")


async def resize(call: Call) -> Response:
    """Change the terminal's size."""
    body = await read_body(call, ResizeRequest)
    return await _send(call, body, TerminalResized(rows=body.rows, cols=body.cols), "resize")


async def send_signal(call: Call) -> Response:
    """Send a signal to whatever holds the terminal, or cancel a command."""
    body = await read_body(call, SignalRequest)
    return await _send(call, body, SignalSent(signal=body.signal, command_id=body.command_id), "signal")


async def _send(
    call: Call, body: SendInputRequest | ResizeRequest | SignalRequest, event: Event, kind: str
) -> Response:
    await open_session(call, body.session_id)
    name = f"{kind}-{request_id(call, body.request_id)}"
    await publish(call, event, session=body.session_id, name=name)
    return reply(AcceptedResponse(), status=202)
