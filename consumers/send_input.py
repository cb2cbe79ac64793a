"""input.sent, terminal.resized, signal.sent: what goes straight to the terminal."""

from __future__ import annotations

from datetime import timedelta

from consumers.agent.client import AgentControl
from consumers.commands import wish_cancelled
from consumers.context import Context
from consumers.sessions import change, load
from consumers.settlement import DONE, Later, Refuse, Settlement
from schemas.envelope import CloudEvent
from schemas.errors import AgentRefused, AgentUnreachable
from schemas.events import InputSent, SignalSent, TerminalResized
from schemas.lifecycle import TAKES_INPUT, SessionState

PATIENCE = timedelta(seconds=10)  # how long an event waits for a session that starts, or an agent that is away
RETRY_SECONDS = 0.1
UNREADY = TAKES_INPUT - {SessionState.READY}


async def send_input(context: Context, cloud_event: CloudEvent) -> Settlement:
    """Give it to the agent, once. Early input waits a little; input for a session that is ending has no effect."""
    try:
        if await _cancelled_before_ready(context, cloud_event):
            return DONE
        ready = await ready_control(context, cloud_event)
        if not isinstance(ready, AgentControl):
            return ready
        await _send(ready, cloud_event)
    except AgentUnreachable as error:
        return patient(context, cloud_event, error.code, str(error))
    except AgentRefused as refusal:
        return await _refused(context, cloud_event, refusal)
    return DONE


async def _refused(context: Context, cloud_event: CloudEvent, refusal: AgentRefused) -> Settlement:
    match refusal.code:
        case "ended":  # the shell is gone, and its session about to be
            return DONE
        case "unknown_command":
            return await _cancel_later(context, cloud_event)
        case "input_full":
            return patient(context, cloud_event, refusal.code, str(refusal))
    raise refusal


async def _cancel_later(context: Context, cloud_event: CloudEvent) -> Settlement:
    """The command is still on its way to the agent, or over: what is on its way is asked for until it has arrived, and
    for what waits longer its document says that it is cancelled."""
    assert isinstance(cloud_event.event, SignalSent)
    waits = await wish_cancelled(context, cloud_event.subject, cloud_event.event.command_id or "")
    young = context.now() - cloud_event.time < PATIENCE
    return Later(RETRY_SECONDS) if waits and young else DONE


async def _cancelled_before_ready(context: Context, cloud_event: CloudEvent) -> bool:
    """Whether this cancels a command of a session that is not ready: it is noted in its document, however long the
    session has to wait."""
    event, session_id = cloud_event.event, cloud_event.subject
    if not isinstance(event, SignalSent) or event.command_id is None or context.controls.peek(session_id) is not None:
        return False
    current = await load(context, session_id)
    if current is None or current.session.state not in UNREADY:
        return False
    if not await wish_cancelled(context, session_id, event.command_id):
        return True
    current = await load(context, session_id)
    return current is None or current.session.state is not SessionState.READY


async def _send(control: AgentControl, cloud_event: CloudEvent) -> None:
    event = cloud_event.event
    match event:
        case InputSent():
            await control.input(cloud_event.id, event.data)
        case TerminalResized():
            await control.request("resize", id=cloud_event.id, rows=event.rows, cols=event.cols)
        case SignalSent(command_id=None):
            await control.request("signal", id=cloud_event.id, name=event.signal.value)
        case SignalSent():
            await control.request("cancel", commandId=event.command_id)


def patient(context: Context, cloud_event: CloudEvent, code: str, reason: str) -> Settlement:
    """Later while the event is young; then refused, so that it holds up nothing behind it for long."""
    young = context.now() - cloud_event.time < PATIENCE
    return Later(RETRY_SECONDS) if young else Refuse(code, reason)


async def ready_control(context: Context, cloud_event: CloudEvent) -> AgentControl | Settlement:
    """The control connection of the event's session, or the verdict where it has none."""
    session_id = cloud_event.subject
    control = context.controls.peek(session_id)
    if control is not None:
        return control
    current = await load(context, session_id)
    if current is None:
        return Refuse("unknown_session", "no document of this session")
    if current.session.state not in TAKES_INPUT:
        return DONE
    if current.session.state is SessionState.READY:
        return await context.controls.get(session_id, current.session)
    if isinstance(cloud_event.event, TerminalResized) and await _remember_size(context, session_id, cloud_event.event):
        return DONE
    return patient(context, cloud_event, "not_ready", f"the session is {current.session.state}")


async def _remember_size(context: Context, session_id: str, event: TerminalResized) -> bool:
    """The shell that is about to start gets the newest size; False where it has started meanwhile."""
    size = {"rows": event.rows, "cols": event.cols}
    fits = await change(context, session_id, lambda session: size if session.state is not SessionState.READY else None)
    return fits is not None
