"""Processes die in the middle of their work; transcripts stay exact and commands run once."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from infra.local.sandbox_record import Record
from tests.journeys.conftest import MakeStack
from tests.journeys.stack import Stack, User

LAST = 2_000_000
TAKE_OVER_SECONDS = 90.0  # the dead worker's lease, and the rest of the output on a busy machine
SLOW_SEQ = f"echo ran >> runs; seq 1 {LAST}"
EXPECTED = b"".join(b"%d\r\n" % number for number in range(1, LAST + 1))


async def _output_begins(user: User, session: str) -> None:
    await user.until_output(session, b"\r\n1000\r\n")


async def _assert_exact(user: User, session: str, command: str) -> None:
    record = await user.ended(session, command, TAKE_OVER_SECONDS)
    assert (record["state"], record["exitCode"]) == ("exited", 0)
    output = await user.read(session, record["startOffset"], record["endOffset"])
    assert len(output) == len(EXPECTED)
    assert output == EXPECTED
    assert (await user.run(session, "cat runs"))[1] == b"ran\r\n"


async def _settled_stack(make_stack: MakeStack, *roles: str) -> tuple[Stack, list[asyncio.subprocess.Process]]:
    stack = make_stack()
    return stack, [await stack.start(role) for role in roles]


@pytest.mark.slow
async def test_a_worker_killed_in_the_middle_of_a_flood_loses_nothing(make_stack: MakeStack) -> None:
    """kill -9: another worker goes on from the committed offset, and the command is not run again."""
    stack, (_, worker) = await _settled_stack(make_stack, "gateway,ticker", "worker")
    async with stack.user() as alice:
        session = await alice.ready()
        command = await alice.execute(session, SLOW_SEQ)
        await _output_begins(alice, session)
        await stack.kill(worker)
        await stack.start("worker")
        await _assert_exact(alice, session, command)


@pytest.mark.slow
async def test_workers_killed_one_after_the_other_lose_nothing(make_stack: MakeStack) -> None:
    """With a second worker at hand a session goes on within the dead one's lease, again and again."""
    stack, (_, *workers) = await _settled_stack(make_stack, "gateway,ticker", "worker", "worker")
    async with stack.user() as alice:
        session = await alice.ready()
        command = await alice.execute(session, SLOW_SEQ)
        await _output_begins(alice, session)
        for worker in workers:
            await stack.start("worker")
            await stack.kill(worker)
        await _assert_exact(alice, session, command)


@pytest.mark.slow
async def test_a_stack_killed_whole_and_started_again_goes_on(make_stack: MakeStack) -> None:
    """The sandbox outlives the crash; the next start adopts it, and a reader sees one exact transcript."""
    stack, (whole,) = await _settled_stack(make_stack, "gateway,worker,ticker")
    async with stack.user() as alice:
        session = await alice.ready()
        await alice.run(session, "KEPT=yes")
        command = await alice.execute(session, SLOW_SEQ)
        await _output_begins(alice, session)
        await stack.kill(whole)
    stack.port = 0
    await stack.start()
    async with stack.user() as alice:
        await _assert_exact(alice, session, command)
        assert (await alice.run(session, "echo $KEPT"))[1] == b"yes\r\n"


@pytest.mark.slow
async def test_a_session_closed_while_the_stack_was_dead_ends_at_its_start(make_stack: MakeStack) -> None:
    """A sandbox whose session has ended is not adopted but removed."""
    stack, (gateway, worker) = await _settled_stack(make_stack, "gateway,ticker", "worker")
    async with stack.user() as alice:
        session = await alice.ready()
        await stack.kill(worker)
        await alice.call("DELETE", f"cleanup-session/{session}")
        await stack.kill(gateway)
    stack.port = 0
    await stack.start()
    async with stack.user() as alice:
        await alice.until(session, lambda status: status["state"] == "closed")
    assert not [each for each in _sandboxes(stack) if not each.name.startswith("pool-")]


async def test_a_sandbox_killed_from_outside_is_lost_and_named(make_stack: MakeStack) -> None:
    """Nobody is told that their program ended well: the session and its running command are lost, with a reason."""
    stack, _ = await _settled_stack(make_stack, "gateway,worker,ticker")
    async with stack.user() as alice:
        session = await alice.ready()
        command = await alice.execute(session, "echo started; sleep 600")
        await alice.until_output(session, b"started")
        (sandbox,) = [each for each in _sandboxes(stack) if (meta := Record(each).meta()) and meta.session == session]
        process = Record(sandbox).process("init")
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        output = await alice.transcript(session)
        status = await alice.status(session)
        assert status["state"] == "lost"
        assert "killed" in status["reason"]
        assert output.gaps[-1]["length"] is None
        assert (await alice.ended(session, command))["state"] == "lost"


async def test_ctrl_c_leaves_nothing_behind(make_stack: MakeStack) -> None:
    """Sessions are closed, and no process, mount or sandbox folder stays."""
    stack, (whole,) = await _settled_stack(make_stack, "gateway,worker,ticker")
    async with stack.user() as alice:
        await alice.ready()
        await alice.ready()
        pids = [process.pid for each in _sandboxes(stack) if (process := Record(each).process("init"))]
        assert pids
        await stack.stop()
    assert whole.returncode == 0, stack.log()
    assert not _sandboxes(stack)
    assert not _running(pids)


def _sandboxes(stack: Stack) -> list[Path]:
    return [entry for entry in (stack.state / "sandboxes").iterdir() if entry.is_dir() and entry.name[0] != "."]


def _running(pids: list[int]) -> list[int]:
    return [pid for pid in pids if _state(pid) not in ("", "Z")]  # a zombie waits for init, and runs no more


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
