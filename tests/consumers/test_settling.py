"""What becomes of messages when settling them fails, or when a handler is refused by the agent."""

from __future__ import annotations

import pytest

from consumers import commands
from consumers.agent.agent import MAX_WAITING_BYTES
from consumers.bury import dead_letter
from consumers.context import read_event
from consumers.settlement import DONE
from consumers.worker import SETTLE_TRIES
from infra.local.subscriber import LocalDelivery, Subscriber
from schemas.documents import Transfer, TransferState, transfer_path
from schemas.envelope import encode, wrap
from schemas.errors import BusUnavailable, MalformedEvent
from schemas.events import (
    CommandSubmitted,
    Event,
    FileItem,
    FileRequested,
    FilesPushed,
    InputSent,
    SessionOpened,
    Signal,
    SignalSent,
    TerminalResized,
)
from schemas.lifecycle import CommandState
from schemas.limits import MAX_COMMAND_BYTES
from schemas.ports import Message, Query, Snapshot
from schemas.topics import DEAD_LETTERS, SESSION_EVENTS
from tests.consumers.house import House
from tests.waiting import until


@pytest.mark.parametrize("failures", [1, pytest.param(SETTLE_TRIES, marks=pytest.mark.slow)])
async def test_an_ack_that_fails_holds_up_its_session_only_shortly(
    staffed: House, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """The bus is away when a message is acknowledged: the next command runs within the ack deadline, not the lease."""
    session = await staffed.ready()
    settle, failed = Subscriber.settle, 0

    async def failing(subscriber: Subscriber, delivery: LocalDelivery) -> None:
        nonlocal failed
        if CommandSubmitted.type in delivery.message.attributes["ce-type"] and failed < failures:
            failed += 1
            raise BusUnavailable("no disk space")
        await settle(subscriber, delivery)

    monkeypatch.setattr(Subscriber, "settle", failing)
    first = await staffed.submit(session, "echo one >> log")
    assert (await staffed.run(session, "cat log"))[1] == b"one\r\n"
    assert (await staffed.ended(session, first)).exit_code == 0
    assert failed == failures


@pytest.fixture
async def deserted(empty_house: House) -> tuple[House, str]:
    """A ready session whose tender is gone: what the handlers do shows alone."""
    async with empty_house.hired:
        await empty_house.hire()
        session = await empty_house.ready()
    return empty_house, session


async def test_what_is_sent_after_the_shell_exited_is_no_dead_letter(deserted: tuple[House, str]) -> None:
    """Keys and commands that were on their way when the shell ended: the keys have no effect, the commands an end."""
    house, session = deserted
    await house.handle(InputSent(data=b"exit\r"), session)
    control = await house.context.controls.get(session, await house.session(session))

    async def over() -> bool:
        return bool((await control.request("status"))["state"] == "ended")

    await until(over, "the shell is gone")
    for event in (
        InputSent(data=b"x"),
        TerminalResized(rows=20, cols=20),
        SignalSent(signal=Signal.INT),
        SignalSent(signal=Signal.INT, command_id="nobody"),
        CommandSubmitted(command_id="late", text="echo late"),
    ):
        assert await house.handle(event, session) == DONE
    await house.hire()
    await house.tick()
    await house.publish(SessionOpened(epoch=(await house.session(session)).epoch), session)
    late = await house.ended(session, "late")
    assert (late.state, late.reason) == (CommandState.KILLED, "session_closed")


@pytest.mark.slow
async def test_a_command_that_finds_the_queue_full_waits(deserted: tuple[House, str]) -> None:
    """However many wait already: it is not lost, and no hole in the numbers blocks those behind it."""
    house, session = deserted
    await house.handle(CommandSubmitted(command_id="first", text="sleep 600"), session)
    most = MAX_WAITING_BYTES // MAX_COMMAND_BYTES
    for number in range(most + 1):
        event = CommandSubmitted(command_id=f"c{number}", text="#" * MAX_COMMAND_BYTES)
        assert await house.handle(event, session) == DONE
    last = await house.command(session, f"c{most}")
    assert last is not None
    assert last.state is CommandState.WAITING


async def test_a_command_that_is_recorded_outlives_its_message(deserted: tuple[House, str]) -> None:
    """Its message died of too many deliveries; the next tender delivers it all the same, and those behind it."""
    house, session = deserted
    record = await commands.record(
        house.context, session, CommandSubmitted(command_id="c1", text="echo on"), house.clock.now()
    )
    assert record is not None
    event = CommandSubmitted(command_id="c1", text="echo on")
    message = encode(wrap(event, subject=session, source="/test", time=house.clock.now()))
    await house.context.bus.publish(DEAD_LETTERS, dead_letter(message, "internal", "its handler failed every time"))
    await house.hire()
    buried = Query("deadLetters")
    await until(lambda: house.context.store.query(buried), "the message is buried")
    await house.publish(SessionOpened(epoch=(await house.session(session)).epoch), session)
    assert (await house.ended(session, "c1")).exit_code == 0
    assert (await house.run(session, "echo next"))[1] == b"next\r\n"


@pytest.mark.parametrize(
    ("event", "what"),
    [
        (FilesPushed(items=(FileItem(path="a"),), transfer_id="t"), "push"),
        (FileRequested(path="a", transfer_id="t"), "content"),
    ],
    ids=("pushed", "requested"),
)
async def test_who_waits_for_a_transfer_whose_message_died_is_told(staffed: House, event: Event, what: str) -> None:
    """It failed, and why: nobody polls for ever."""
    session = await staffed.record()
    message = encode(wrap(event, subject=session, source="/test", time=staffed.clock.now()))
    await staffed.context.bus.publish(DEAD_LETTERS, dead_letter(message, "internal", "its handler failed every time"))
    path = transfer_path(session, "t")
    kept = await until(lambda: staffed.context.store.get(path), "the transfer has an end")
    assert kept is not None
    transfer = Transfer.of(kept)
    assert (transfer.state, transfer.what, transfer.code) == (TransferState.FAILED, what, "internal")


@pytest.mark.parametrize(
    "event",
    [FilesPushed(items=(FileItem(path="a"),), transfer_id="t"), FileRequested(path="a", transfer_id="t")],
    ids=("pushed", "requested"),
)
async def test_who_waits_for_a_transfer_whose_sandbox_is_gone_is_told(
    deserted: tuple[House, str], event: Event
) -> None:
    """The session's document still says ready, and is about to say lost: its transfers are nobody else's to end."""
    house, session = deserted
    for sandbox in await house.context.sandboxes.list():
        await house.context.sandboxes.delete(sandbox.name, sandbox.uid)
    assert await house.handle(event, session) == DONE
    kept = await house.context.store.get(transfer_path(session, "t"))
    assert kept is not None
    transfer = Transfer.of(kept)
    assert (transfer.state, transfer.code) == (TransferState.FAILED, "session_ended")


@pytest.mark.parametrize(
    "attributes", [{"ce-subject": "no/session/at-all"}, {"ce-time": "0001-01-01T00:00:00+14:00"}], ids=str
)
async def test_an_envelope_that_no_handler_can_read_is_buried_once(staffed: House, attributes: dict[str, str]) -> None:
    """It goes to the dead letters with its reason, and is not dug up again and again there."""
    event = CommandSubmitted(command_id="c", text="x")
    message = encode(wrap(event, subject="s" + "a" * 25, source="/test", time=staffed.clock.now()))
    broken = Message(message.data, {**message.attributes, **attributes}, "key")
    await staffed.context.bus.publish(SESSION_EVENTS, broken)

    async def buried() -> list[Snapshot]:
        return await staffed.context.store.query(Query("deadLetters"))

    (kept,) = await until(buried, "the message is buried")
    assert kept.data["attributes"]["pigeon-dead-letter-cause"] == "malformed_event"
    with pytest.raises(MalformedEvent):  # which burying takes for what it is: there is nothing more to do
        read_event(broken)
