"""Events come twice, late, out of order and to several workers; users must not notice."""

from __future__ import annotations

import asyncio

from consumers.chunks import append
from consumers.settlement import DONE, Refuse
from consumers.tend_session import tend_session
from schemas.documents import Transfer, TransferState, transfer_path
from schemas.events import (
    CloseReason,
    CommandSubmitted,
    FileItem,
    FileRequested,
    FilesPushed,
    InputSent,
    SessionClosed,
    SessionOpened,
    SessionRequested,
)
from schemas.ids import SessionId
from schemas.lifecycle import CommandState, SessionState
from schemas.limits import MAX_CHUNK_BYTES
from schemas.transcript import Data
from tests.consumers.house import House
from tests.waiting import until

NOBODY = "s" + "a" * 25


async def test_a_session_requested_twice_gets_one_sandbox(empty_house: House) -> None:
    """A redelivered request finds the sandbox that the first one made."""
    name = await empty_house.record()
    for _ in range(2):
        assert await empty_house.handle(SessionRequested(user_id="alice"), name) == DONE
    assert len(await empty_house.context.sandboxes.list()) == 1
    assert (await empty_house.session(name)).state is SessionState.STARTING


async def test_many_workers_admitting_at_once_make_one_sandbox_a_session(empty_house: House) -> None:
    """Admission is decided by the document, not by who asks."""
    names = [await empty_house.record() for _ in range(3)]
    fellows = [empty_house.fellow() for _ in range(3)]
    houses = [House(fellow, empty_house.clock, empty_house.hired) for fellow in fellows]
    await asyncio.gather(*(each.handle(SessionRequested(user_id="alice"), name) for each in houses for name in names))
    sandboxes = await empty_house.context.sandboxes.list()
    assert sorted(str(sandbox.session) for sandbox in sandboxes) == sorted(names)


async def test_a_command_delivered_twice_runs_once(staffed: House) -> None:
    """Pub/Sub may redeliver; the user's code must not run again."""
    session = await staffed.ready()
    event = CommandSubmitted(command_id="c1", text="echo once >> count; cat count")
    for _ in range(3):
        await staffed.publish(event, session, id="e1")
    await staffed.ended(session, "c1")
    record, output = await staffed.run(session, "wc -l < count")
    assert output == b"1\r\n"
    assert record.number == 2


async def test_a_command_handled_by_two_workers_at_once_runs_once(staffed: House) -> None:
    """The number is given in a transaction, and the agent knows every number it has run."""
    session = await staffed.ready()
    fellow = House(staffed.fellow(), staffed.clock, staffed.hired)
    event = CommandSubmitted(command_id="c1", text="echo once >> count")
    await asyncio.gather(*(each.handle(event, session) for each in (staffed, fellow, staffed, fellow)))
    await staffed.ended(session, "c1")
    assert (await staffed.run(session, "cat count"))[1] == b"once\r\n"
    await fellow.context.controls.close()


async def test_input_delivered_twice_is_typed_once(staffed: House) -> None:
    """A keystroke's event id is what the agent remembers."""
    session = await staffed.ready()
    command = await staffed.submit(session, "read line; echo got $line")
    await until(lambda: _holds(staffed, session, b"read line"), "the command runs")
    for _ in range(3):
        await staffed.publish(InputSent(data=b"x"), session, id="key")
    await staffed.publish(InputSent(data=b"\r"), session, id="enter")
    record = await staffed.ended(session, command)
    assert (await staffed.transcript(session))[record.start_offset : record.end_offset].endswith(b"got x\r\n")


async def _holds(house: House, session: str, text: bytes) -> bool:
    return text in await house.transcript(session)


async def test_a_command_that_overtakes_its_session_waits_for_it(staffed: House) -> None:
    """A command recorded before the sandbox exists runs when the shell is there."""
    session = await staffed.record()
    command = await staffed.submit(session, "echo early")

    async def recorded() -> bool:
        return await staffed.command(session, command) is not None

    await until(recorded, "the command is recorded")
    await staffed.publish(SessionRequested(user_id="alice"), session)
    assert (await staffed.ended(session, command)).exit_code == 0


async def test_a_command_for_an_ended_session_has_an_end_at_once(staffed: House) -> None:
    """Whoever submitted it sees that it was not run, instead of waiting for ever."""
    session = await staffed.ready()
    await staffed.publish(SessionClosed(reason=CloseReason.USER), session)
    await staffed.until_state(session, SessionState.CLOSED)
    command = await staffed.submit(session, "echo late")
    record = await staffed.ended(session, command)
    assert (record.state, record.reason) == (CommandState.KILLED, "session_closed")


async def test_closing_twice_closes_once(staffed: House) -> None:
    """The user's place is given back once, however often the close is delivered."""
    kept, session = await staffed.ready(), await staffed.ready()
    for _ in range(3):
        await staffed.publish(SessionClosed(reason=CloseReason.USER), session)
    await staffed.until_state(session, SessionState.CLOSED)
    assert await staffed.handle(SessionClosed(reason=CloseReason.USER), session) == DONE
    assert await staffed.live_sessions() == 1
    assert (await staffed.session(kept)).state is SessionState.READY


async def test_a_session_closed_before_it_was_requested_never_starts(empty_house: House) -> None:
    """Events out of order: the request finds its session ended and makes no sandbox."""
    name = await empty_house.record()
    await empty_house.handle(SessionClosed(reason=CloseReason.USER), name)
    await empty_house.handle(SessionRequested(user_id="alice"), name)
    assert (await empty_house.session(name)).state is SessionState.CLOSED
    assert await empty_house.context.sandboxes.list() == []
    assert await empty_house.live_sessions() == 0


async def test_commands_waiting_at_the_close_are_settled(staffed: House) -> None:
    """No command is left open by a session that ended."""
    session = await staffed.ready()
    running = await staffed.submit(session, "sleep 60")
    waiting = await staffed.submit(session, "echo never")
    await until(lambda: _holds(staffed, session, b"sleep 60"), "the first command runs")
    await staffed.publish(SessionClosed(reason=CloseReason.USER), session)
    await staffed.until_state(session, SessionState.CLOSED)
    assert (await staffed.ended(session, running)).state is CommandState.KILLED
    assert (await staffed.ended(session, waiting)).state is CommandState.KILLED


async def test_events_of_unknown_sessions_are_refused(empty_house: House) -> None:
    """What names no session goes to the dead letters instead of coming again for ever."""
    for event in (SessionRequested(user_id="alice"), CommandSubmitted(command_id="c", text="x"), InputSent(data=b"x")):
        verdict = await empty_house.handle(event, NOBODY)
        assert isinstance(verdict, Refuse)
        assert verdict.code == "unknown_session"


async def test_two_workers_on_one_session_write_one_transcript(staffed: House) -> None:
    """A second tender takes over in the middle of a flood; no byte is lost, doubled or out of place."""
    session = await staffed.ready()
    await staffed.hire()
    command = await staffed.submit(session, "seq 1 200000")
    for _ in range(4):
        await until(lambda: _grows(staffed, session), "output is committed")
        epoch = (await staffed.session(session)).epoch
        await staffed.publish(SessionOpened(epoch=epoch), session)
        await until(lambda was=epoch: _newer(staffed, session, was), "another tender took over")  # type: ignore[misc]
    record = await staffed.ended(session, command)
    output = (await staffed.transcript(session))[record.start_offset : record.end_offset]
    assert output == b"".join(b"%d\r\n" % number for number in range(1, 200001))


async def _grows(house: House, session: str) -> bool:
    return len(await house.transcript(session)) > 0


async def _newer(house: House, session: str, epoch: int) -> bool:
    return (await house.session(session)).epoch > epoch


async def test_a_stale_message_does_not_disturb_a_healthy_tender(staffed: House) -> None:
    """A doubled session.opened finds its session tended and is dropped."""
    session = await staffed.ready()
    epoch = (await staffed.session(session)).epoch
    verdict = await tend_session(
        staffed.context, session, SessionOpened(epoch=0), message_id="other", attempt=1, stopping=asyncio.Event()
    )
    assert verdict == DONE
    assert (await staffed.session(session)).epoch == epoch


async def test_files_pushed_twice_are_written_once(staffed: House) -> None:
    """A redelivered push does not overwrite what the user has changed since."""
    session = SessionId(await staffed.ready())
    event = FilesPushed(items=(FileItem(path="a.txt", data=b"pushed\n"),), transfer_id="t1")
    await staffed.handle(event, session, id="push")
    await staffed.run(session, "echo changed > a.txt")
    await staffed.handle(event, session, id="push")
    assert (await staffed.run(session, "cat a.txt"))[1] == b"changed\r\n"


async def test_a_file_that_changed_between_two_deliveries_is_not_handed_out_torn(staffed: House) -> None:
    """The first delivery died after a chunk: what follows is of another version, and the transfer says so."""
    session = SessionId(await staffed.ready())
    event = FileRequested(path="big", transfer_id="t1")
    await staffed.run(session, "head -c 300000 /dev/zero > big")
    owner, now = transfer_path(session, "t1"), staffed.clock.now()
    await append(staffed.context, owner, Data(0, b"\1" * MAX_CHUNK_BYTES), now)
    assert await staffed.handle(event, session) == DONE
    snapshot = await staffed.context.store.get(owner)
    assert snapshot is not None
    transfer = Transfer.of(snapshot)
    assert (transfer.state, transfer.code) == (TransferState.FAILED, "conflict")
