"""input.sent, terminal.resized, signal.sent: what goes straight to the terminal."""

from __future__ import annotations

from datetime import timedelta

from consumers.agent.client import AgentControl
from consumers.context import Context
from consumers.sessions import change, load
from consumers.settlement import DONE, Later, Refuse, Settlement
from schemas.documents import Command, command_path
from schemas.envelope import CloudEvent
from schemas.errors import AgentRefused, AgentUnreachable
from schemas.events import InputSent, SignalSent, TerminalResized
from schemas.lifecycle import TAKES_INPUT, CommandState, SessionState

PATIENCE = timedelta(seconds=10)  # how long an event waits for a session that starts, or an agent that is away
RETRY_SECONDS = 0.1


async def send_input(context: Context, cloud_event: CloudEvent) -> Settlement:
    """Give it to the agent, once. Early input waits a little; input for a session that is ending has no effect."""
    try:
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
        case "unknown_command" if not await _waits(context, cloud_event):
            return DONE
        case "input_full" | "unknown_command":
            return patient(context, cloud_event, refusal.code, str(refusal))
    raise refusal


async def _waits(context: Context, cloud_event: CloudEvent) -> bool:
    """Whether the command to be cancelled is still on its way to the agent."""
    assert isinstance(cloud_event.event, SignalSent)
    snapshot = await context.store.get(command_path(cloud_event.subject, cloud_event.event.command_id or ""))
    return snapshot is not None and Command.of(snapshot).state is CommandState.WAITING


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
    if isinstance(cloud_event.event, TerminalResized):
        await _remember_size(context, session_id, cloud_event.event)
        return DONE
    return patient(context, cloud_event, "not_ready", f"the session is {current.session.state}")


async def _remember_size(context: Context, session_id: str, event: TerminalResized) -> None:
    """The shell that is about to start gets the newest size."""
    size = {"rows": event.rows, "cols": event.cols}
    await change(context, session_id, lambda session: size if session.state is not SessionState.READY else None)
