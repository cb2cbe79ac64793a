"""command.submitted: the command is recorded with its number, and handed to the agent if the session is ready."""

from __future__ import annotations

from datetime import datetime

from consumers import commands
from consumers.context import Context
from consumers.settlement import DONE, Refuse, Settlement
from schemas.events import CommandSubmitted
from schemas.lifecycle import CommandState


async def run_command(context: Context, session_id: str, event: CommandSubmitted, at: datetime) -> Settlement:
    """Record first, so that the command survives whatever happens next; then deliver. Never waits for readiness."""
    command = await commands.record(context, session_id, event, at)
    if command is None:
        return Refuse("unknown_session", "no document of this session")
    if command.state is CommandState.WAITING:
        await commands.deliver(context, session_id, event.command_id, command)
    return DONE
