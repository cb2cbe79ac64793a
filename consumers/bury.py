"""dead-letters: keep the message with its cause, and give what it stood for an end."""

from __future__ import annotations

import logging

from consumers import commands
from consumers.context import Context, read_event
from consumers.push_files import fail_transfer
from consumers.sessions import load
from consumers.settlement import DONE, Settlement
from consumers.tend_session import finish
from schemas.errors import AlreadyExists, MalformedEvent
from schemas.events import CommandSubmitted, FileRequested, FilesPushed, SessionRequested
from schemas.lifecycle import CommandState, SessionState
from schemas.ports import Delivery, Message

CAUSE, REASON = "pigeon-dead-letter-cause", "pigeon-dead-letter-reason"
NEVER = ("command_conflict", "command_gap", "malformed")  # the agent's words for a command that it will not take
KEPT_BYTES = 512 * 1024  # of a dead message; a document holds 1 MiB

log = logging.getLogger(__name__)


def dead_letter(message: Message, cause: str, reason: str) -> Message:
    """The message as it goes to the dead letters: its own bytes and attributes, and why."""
    attributes = {**message.attributes, CAUSE: cause[:256], REASON: reason.encode()[:900].decode(errors="ignore")}
    if message.ordering_key:
        attributes["pigeon-dead-letter-ordering-key"] = message.ordering_key
    return Message(message.data, attributes)


async def bury(context: Context, delivery: Delivery) -> Settlement:
    """Keep it in `deadLetters`; fail the session or the transfer, or lose the command, that waited for it.

    A command that is recorded is not lost with its message: the tender delivers it, or the session's end settles it.
    """
    message = delivery.message
    log.error("dead letter %s: %s", delivery.message_id, dict(message.attributes))
    await _keep(context, delivery)
    try:
        cloud_event = read_event(message)
    except MalformedEvent:
        return DONE
    reason = message.attributes.get(REASON, "its event could not be handled")
    if isinstance(cloud_event.event, CommandSubmitted) and message.attributes.get(CAUSE) in NEVER:
        state, command = CommandState.LOST, cloud_event.event.command_id
        await commands.change(context, cloud_event.subject, command, state, reason=reason, ended_at=context.now())
    elif isinstance(cloud_event.event, SessionRequested):
        await _fail_session(context, cloud_event.subject, reason)
    elif isinstance(cloud_event.event, FilesPushed | FileRequested):
        await fail_transfer(context, cloud_event, message.attributes.get(CAUSE, "internal"), reason)
    return DONE


async def _fail_session(context: Context, session_id: str, reason: str) -> None:
    current = await load(context, session_id)
    if current is not None and current.session.state in (SessionState.REQUESTED, SessionState.QUEUED):
        await finish(context, current, SessionState.FAILED, reason, 0)


async def _keep(context: Context, delivery: Delivery) -> None:
    fields = {
        "data": delivery.message.data[:KEPT_BYTES],
        "attributes": dict(delivery.message.attributes),
        "size": len(delivery.message.data),
        "at": delivery.published_at,
        "expireAt": context.now() + context.limits.retention,
    }
    try:
        await context.store.create(f"deadLetters/{delivery.message_id}", fields)
    except AlreadyExists:
        return
