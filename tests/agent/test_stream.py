"""Attachments: every byte exactly once, whoever reads, however often the reader dies."""

from __future__ import annotations

import contextlib
import json
import random
import re
from pathlib import Path

import pytest

from consumers.agent import agent as wire
from tests.agent.client import AgentProcess, Attachment, Ended, Terminal, agent, wait_until

FLOOD = "seq 1 300000"
FLOOD_BYTES = b"".join(b"%d\r\n" % number for number in range(1, 300_001))


def resumed(process: AgentProcess, whole: bytearray, marks: list[int], epoch: int) -> Attachment:
    """Attach where the last reader stopped."""
    return process.attach(epoch=epoch, offset=len(whole), mark=marks[-1] if marks else 0)


@pytest.mark.slow
@pytest.mark.parametrize("acks", [True, False], ids=["committing", "late"])
def test_readers_that_die_in_a_flood_lose_nothing(tmp_path: Path, acks: bool) -> None:
    """Killed again and again, the readers together saw every byte and every mark once."""
    rng = random.Random(7)
    with agent(tmp_path) as process:
        control = process.control()
        control.request("run", number=1, commandId="a", text=FLOOD)
        whole, marks = bytearray(), list[int]()
        finished = None
        for epoch in range(1, 1_000):
            reader = resumed(process, whole, marks, epoch)
            reader.acking = acks
            taken = rng.choice([1, 3, 20, 60])
            for _ in range(taken):
                if finished and reader.position >= finished["offset"]:
                    break
                reader.step()
                finished = finished or reader.find_mark("finished")
            whole += reader.data
            marks += [reader.last_mark or 0]
            reader.connection.close()
            if finished and len(whole) >= finished["offset"]:
                break
        assert finished is not None
        assert whole[finished["startOffset"] : finished["offset"]] == FLOOD_BYTES


def test_a_reader_may_start_at_any_offset_that_is_kept(terminal: Terminal) -> None:
    """The stream from an offset is the stream's tail from there, and earlier bytes count as committed."""
    terminal.stream.acking = False
    mark, _ = terminal.run("seq 1 100")
    whole = bytes(terminal.stream.data)
    for offset in (mark["startOffset"], mark["startOffset"] + 7, mark["offset"]):
        reader = terminal.process.attach(epoch=offset, offset=offset, acking=False)
        assert reader.until_mark("finished") == mark
        if len(whole) > offset:
            reader.until_text(whole[offset:])
        assert reader.data[: len(whole) - offset] == whole[offset:]


@pytest.mark.parametrize(
    ("offset", "mark", "code"),
    [
        (0, 2, "bad_offset"),
        (10**9, 2, "bad_offset"),
        (None, 0, "bad_mark"),
        (None, 9, "bad_mark"),
        (-1, 2, "malformed"),
    ],
)
def test_what_is_not_kept_cannot_be_asked_for(terminal: Terminal, offset: int | None, mark: int, code: str) -> None:
    """Neither committed bytes and marks nor those of the future: the reader is told, not given a hole."""
    terminal.run("true")
    wait_until(lambda: terminal.control.request("status")["committed"] == terminal.stream.position)
    start = terminal.stream.position if offset is None else offset
    assert terminal.process.attach(epoch=2, offset=start, mark=mark).until_end() == code


def test_a_new_worker_may_ask_for_every_mark_kept(terminal: Terminal) -> None:
    """Who takes over does not know which marks were recorded: it gets those that were not acked."""
    terminal.stream.acking = False
    terminal.run("true")
    terminal.stream.connection.send(wire.ACKMARK, 1)
    terminal.control.request("status")
    reader = terminal.process.attach(epoch=2, mark=None)
    assert reader.until_mark("finished")["commandId"] == "c1"
    wait_until(lambda: terminal.control.request("status")["marks"] == 2)
    assert [mark["kind"] for mark in reader.marks] in (["finished"], ["started", "finished"])


def test_the_newest_epoch_wins(terminal: Terminal) -> None:
    """A worker that lost its lease is told so, now and when it comes back."""
    newer = terminal.process.attach(epoch=5)
    newer.until(lambda: newer.statuses)
    assert terminal.stream.until_end() == "superseded"
    assert terminal.process.attach(epoch=4).until_end() == "superseded"
    same = terminal.process.attach(epoch=5)
    same.until(lambda: same.statuses)
    assert newer.until_end() == "superseded"


def test_an_old_attachment_acks_nothing_any_more(terminal: Terminal) -> None:
    """What a superseded worker says late does not make bytes disappear."""
    terminal.stream.acking = False
    terminal.stream.until_text(b"$ ")
    newer = terminal.process.attach(epoch=5, acking=False)
    newer.until_text(b"$ ")
    with contextlib.suppress(OSError):
        terminal.stream.connection.send(wire.ACK, terminal.stream.position)
    assert terminal.control.request("status")["committed"] == 0


def test_more_may_be_committed_than_this_reader_has_seen(terminal: Terminal) -> None:
    """Two writers overlap at a takeover: an ack of bytes that are still on their way is no offence."""
    terminal.stream.acking = False
    terminal.run("seq 1 1000")
    end = terminal.stream.position
    reader = terminal.process.attach(epoch=2, acking=False)
    reader.connection.send(wire.ACK, end)
    reader.until(lambda: reader.position >= end)
    wait_until(lambda: terminal.control.request("status")["committed"] == end)


def test_an_ack_of_the_future_ends_the_connection(terminal: Terminal) -> None:
    """Committing what was never printed is a defect, and it is said aloud."""
    terminal.stream.connection.send(wire.ACK, 10**9)
    assert terminal.stream.until_end() == "protocol"


@pytest.mark.slow
def test_output_waits_for_commits(tmp_path: Path) -> None:
    """When nobody commits, the program blocks and nothing is lost; when somebody does, it goes on."""
    with agent(tmp_path, spoolBytes=100_000) as process:
        terminal = Terminal(process)
        terminal.stream.acking = False
        terminal.submit(FLOOD + "; echo over >done")
        terminal.stream.until(lambda: terminal.stream.position >= 100_000)
        assert terminal.stream.position <= 100_000 + 1_000  # what the agent adds itself may be over
        assert not (process.workspace / "done").exists()
        reader = process.attach(epoch=2, offset=0, mark=0)
        mark = reader.until_mark("finished")
        assert reader.between(mark["startOffset"], mark["offset"]) == FLOOD_BYTES


def test_a_reader_that_does_not_read_stalls_nothing_within_the_spool(tmp_path: Path) -> None:
    """The terminal goes on while the network is stuck, as far as the spool goes."""
    with agent(tmp_path) as process:
        terminal = Terminal(process)
        terminal.submit(FLOOD + "; echo over >done")
        wait_until(lambda: (process.workspace / "done").exists())
        assert terminal.stream.position == 0


def test_the_output_budget_ends_the_output_not_the_commands(tmp_path: Path) -> None:
    """Past the budget bytes are counted instead of kept; codes, marks and offsets stay right."""
    with agent(tmp_path, outputBytes=5_000) as process:
        terminal = Terminal(process)
        first = terminal.stream.until_mark("finished", terminal.submit(FLOOD))
        second = terminal.stream.until_mark("finished", terminal.submit("(exit 3)"))
        assert first["offset"] - first["startOffset"] == len(FLOOD_BYTES)
        assert second["exitCode"] == 3
        terminal.stream.until(lambda: terminal.stream.position >= second["offset"])
        assert len(terminal.stream.data) == 5_000
        assert sum(length for _, length in terminal.stream.gaps) == terminal.stream.position - 5_000
        assert terminal.control.request("status")["discarded"] >= len(FLOOD_BYTES) - 5_000


def test_a_gap_can_be_resumed_in_its_middle(tmp_path: Path) -> None:
    """A worker that committed part of a gap goes on from there."""
    with agent(tmp_path, outputBytes=100) as process:
        terminal = Terminal(process)
        terminal.stream.acking = False
        mark = terminal.stream.until_mark("finished", terminal.submit("seq 1 1000"))
        reader = process.attach(epoch=2, offset=mark["offset"] - 50)
        reader.until(lambda: reader.position >= mark["offset"])
        assert reader.gaps[0][0] == mark["offset"] - 50


def test_a_lone_escape_is_seen_although_nothing_follows(terminal: Terminal) -> None:
    """What may be the start of a mark is held back for a moment only."""
    terminal.submit("printf 'x\\033'; sleep 60")
    terminal.stream.until(lambda: terminal.stream.data.endswith(b"\r\nx\x1b"))


def test_what_a_person_waits_for_is_marked(terminal: Terminal) -> None:
    """The echo of a key comes as ECHO, so that it is written at once; a later flood does not."""
    terminal.stream.until_text(b"$ ")
    terminal.control.input(b"Q")
    terminal.stream.until_text(b"Q")
    assert terminal.stream.echoed.endswith(b"Q")
    terminal.control.input(b"\x15")
    terminal.submit("sleep 0.2; echo late")
    terminal.stream.until_text(b"\r\nlate\r\n")
    assert b"\nlate" not in terminal.stream.echoed


def test_status_tells_of_life(tmp_path: Path) -> None:
    """An attachment hears at once when the terminal becomes busy and idle, and regularly in between."""
    with agent(tmp_path, "--status", "0.05") as process:
        terminal = Terminal(process)
        stream = terminal.stream
        stream.until(lambda: stream.statuses and not stream.statuses[-1]["busy"])
        command = terminal.submit("sleep 0.3")
        stream.until(lambda: stream.statuses[-1]["busy"])
        assert (stream.statuses[-1]["state"], stream.statuses[-1]["commandId"]) == ("busy", command)
        stream.until(lambda: not stream.statuses[-1]["busy"])
        count = len(stream.statuses)
        stream.until(lambda: len(stream.statuses) > count + 2)
        assert stream.statuses[-1]["end"] == stream.position


def test_a_notice_comes_first(tmp_path: Path) -> None:
    """The transcript begins with what the session wants to say, then the prompt."""
    with agent(tmp_path, notice="Welcome.\nBe good.") as process:
        stream = process.attach()
        stream.until_text(b"$ ")
        assert re.match(rb"Welcome\.\r\nBe good\.\r\n\x1b\[\?2004h\x1b\[32m~\x1b\[0m \$ ", stream.data)


def test_the_greeting_says_whether_it_is_open(tmp_path: Path) -> None:
    """Before OPEN no shell runs and nothing else is answered; OPEN again is the same OPEN."""
    process = AgentProcess(tmp_path)
    try:
        stranger = process.connect()
        assert stranger.hello["opened"] is False
        early = Attachment(process.connect(), mark=None)
        with pytest.raises(Ended) as ended:
            early.step()
        assert ended.value.code == "not_open"
        first = stranger.open()
        again = process.connect()
        assert again.hello["opened"] is True
        assert again.open() == first
        assert json.dumps(first["bootId"]) == json.dumps(again.hello["bootId"])
    finally:
        process.stop()
