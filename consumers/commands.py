"""Changes to command documents, and handing commands to the agent in the order of their numbers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Any

from consumers.agent.client import AgentControl
from consumers.context import Context
from consumers.sessions import MAX_RETRIES, Held, load
from schemas.documents import Command, Session, command_path, commands_of, plain, session_path
from schemas.errors import AgentRefused, AlreadyExists, Conflict
from schemas.events import CommandSubmitted
from schemas.lifecycle import TAKES_INPUT, UNSETTLED, CommandState, SessionState, check_command_step
from schemas.ports import Query, Transaction, Where

PAGE = 50
SESSION_CLOSED = "session_closed"  # why a command that never ran was killed


async def record(context: Context, session_id: str, event: CommandSubmitted, at: datetime) -> Command | None:
    """Give the command the session's next number and create its document, once; None if there is no such session.

    A command for a session that takes no input any more is recorded as killed, so that its sender sees an end.
    """
    path = command_path(session_id, event.command_id)

    async def work(transaction: Transaction) -> Command | None:
        snapshot = await transaction.get(session_path(session_id))
        if snapshot is None:
            return None
        session = Session.of(snapshot)
        command = _new(event, session, at)
        transaction.create(path, command.fields())
        transaction.update(session_path(session_id), {"nextCommand": session.next_command + 1})
        return command

    try:
        return await context.store.transact(work)
    except AlreadyExists:  # a redelivery; looking first would cost every command a read and a round trip
        known = await context.store.get(path)
        return None if known is None else Command.of(known)


def _new(event: CommandSubmitted, session: Session, at: datetime) -> Command:
    late = session.state not in TAKES_INPUT
    return Command(
        number=session.next_command,
        text=event.text,
        state=CommandState.KILLED if late else CommandState.WAITING,
        reason=SESSION_CLOSED if late else "",
        timeout_seconds=event.timeout_seconds,
        submitted_at=at,
        ended_at=at if late else None,
        expire_at=session.expire_at,
    )


async def change(context: Context, session_id: str, command_id: str, state: CommandState, **fields: Any) -> bool:
    """Step a command to `state` with snake_case `fields`; False if it is missing or has ended already."""

    def step(command: Command) -> dict[str, Any] | None:
        if command.state not in UNSETTLED or command.state is state:
            return None
        check_command_step(command.state, state)
        stored = command.model_copy(update={**fields, "state": state}).fields()
        names = {Command.model_fields[name].alias or name for name in (*fields, "state")}
        return plain({name: stored[name] for name in names})

    _, written = await _alter(context, session_id, command_id, step)
    return written


async def _alter(
    context: Context, session_id: str, command_id: str, decide: Callable[[Command], dict[str, Any] | None]
) -> tuple[Command | None, bool]:
    """Write what `decide` makes of the command's present record, None being nothing; it is asked again when somebody
    else wrote first. Returns the record as it was read last, and whether it was written."""
    path = command_path(session_id, command_id)
    for _ in range(MAX_RETRIES):
        snapshot = await context.store.get(path)
        if snapshot is None:
            return None, False
        command = Command.of(snapshot)
        fields = decide(command)
        if fields is None:
            return command, False
        try:
            await context.store.update(path, fields, expect=snapshot.version)
        except Conflict:
            continue
        return command, True
    raise Conflict(f"command {command_id} was written by others {MAX_RETRIES} times in a row")


async def in_state(context: Context, session_id: str, state: CommandState) -> AsyncIterator[tuple[str, Command]]:
    """The session's commands in `state`, by number, read in pages."""
    least = 0
    while True:
        query = Query(
            commands_of(session_id),
            (Where("state", "==", state.value), Where("number", ">=", least)),
            order_by="number",
            limit=PAGE,
        )
        page = await context.store.query(query)
        for snapshot in page:
            command = Command.of(snapshot)
            least = command.number + 1
            yield snapshot.id, command
        if len(page) < PAGE:
            return


async def deliver_waiting(context: Context, current: Held) -> None:
    """Hand every waiting command to the agent. Raises AgentUnreachable or SandboxGone; repeating it is harmless."""
    if current.session.state is not SessionState.READY:
        return
    control = await context.controls.get(current.id, current.session)
    async for command_id, command in in_state(context, current.id, CommandState.WAITING):
        await hand_over(context, control, command_id, command)


async def deliver(context: Context, session_id: str, command_id: str, command: Command) -> None:
    """Hand one new command to the agent, after those before it if it does not know them yet.

    Before the session is ready nothing happens: its tender delivers what waits.
    """
    control = context.controls.peek(session_id) or await _ready_control(context, session_id)
    if control is None:
        return
    try:
        await hand_over(context, control, command_id, command)
    except AgentRefused as refusal:
        if refusal.code != "command_gap":
            raise
        current = await load(context, session_id)
        if current is not None:
            await deliver_waiting(context, current)


async def _ready_control(context: Context, session_id: str) -> AgentControl | None:
    current = await load(context, session_id)
    if current is None or current.session.state is not SessionState.READY:
        return None
    return await context.controls.get(session_id, current.session)


async def hand_over(context: Context, control: AgentControl, command_id: str, command: Command) -> None:
    """Give one command to the agent, which runs it once, whatever happens to this call."""
    seconds = command.timeout_seconds or int(context.limits.command_timeout.total_seconds())
    fields = {"number": command.number, "commandId": command_id, "text": command.text, "timeoutSeconds": seconds}
    await control.request("run", **fields, **({"cancelled": True} if command.cancelled else {}))


async def wish_cancelled(context: Context, session_id: str, command_id: str) -> bool:
    """Have a command that waits cancelled when the agent is given it; False if it is missing or waits no more.

    Who sees the session not ready after this need do no more: its tender reads what waits after the step to ready.
    """

    def wish(command: Command) -> dict[str, Any] | None:
        wanted = command.state is CommandState.WAITING and not command.cancelled
        return {"cancelled": True} if wanted else None

    command, _ = await _alter(context, session_id, command_id, wish)
    return command is not None and command.state is CommandState.WAITING


async def settle_all(context: Context, session_id: str, state: CommandState, reason: str) -> None:
    """Give every command that has no end yet this one: a session that ended leaves none open."""
    for unsettled in UNSETTLED:
        async for command_id, _ in in_state(context, session_id, unsettled):
            await change(context, session_id, command_id, state, reason=reason, ended_at=context.now())


async def settle_left(context: Context, session_id: str, state: SessionState, reason: str) -> None:
    """Settle what was recorded while its session was stepping to this end state: nothing delivers it any more."""
    if state is SessionState.LOST:
        await settle_all(context, session_id, CommandState.LOST, reason)
    else:
        await settle_all(context, session_id, CommandState.KILLED, SESSION_CLOSED)
