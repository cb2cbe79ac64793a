"""command.submitted: the command is recorded with its number, and handed to the agent if the session is ready."""

from __future__ import annotations

from datetime import datetime, timedelta

from consumers import commands
from consumers.context import Context
from consumers.settlement import DONE, Later, Refuse, Settlement
from schemas.errors import AgentRefused, AgentUnreachable
from schemas.events import CommandSubmitted
from schemas.lifecycle import CommandState

PATIENCE = timedelta(seconds=5)  # with an agent that cannot be reached, counted from the submission
RETRY_SECONDS = 0.2
NOT_NOW = ("queue_full", "ended")  # refusals after which the command waits: its tender delivers or settles it


async def run_command(context: Context, session_id: str, event: CommandSubmitted, at: datetime) -> Settlement:
    """Record first, so that the command survives whatever happens next; then deliver. Never waits for readiness.

    An agent that cannot be reached for a while must not hold up what follows, the close above all: the tender delivers
    what waits whenever it signs the session.
    """
    command = await commands.record(context, session_id, event, at)
    if command is None:
        return Refuse("unknown_session", "no document of this session")
    if command.state is CommandState.WAITING:
        try:
            await commands.deliver(context, session_id, event.command_id, command)
        except AgentUnreachable:
            if context.now() - at < PATIENCE:
                return Later(RETRY_SECONDS)
        except AgentRefused as refusal:
            if refusal.code not in NOT_NOW:
                raise
    return DONE
