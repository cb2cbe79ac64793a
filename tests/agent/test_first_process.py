"""The agent as PID 1 of its own PID namespace, as in a pod. Needs the right to make namespaces."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from consumers.agent import agent as wire
from tests.agent.client import AGENT, KEY, PYTHON, AgentProcess, Terminal, wait_until

UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def may_unshare() -> bool:
    """Whether this user can make a PID namespace here."""
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not may_unshare(), reason="no right to make PID namespaces")


@pytest.fixture
def first(tmp_path: Path) -> Iterator[AgentProcess]:
    """An opened agent that is PID 1; `process` is unshare, its parent."""
    running = AgentProcess(tmp_path, before=UNSHARE)
    try:
        running.open()
        yield running
    finally:
        running.stop()


@contextlib.contextmanager
def helper_from_outside(first: AgentProcess) -> Iterator[subprocess.Popen[bytes]]:
    """`agent control`, put into the namespace as an exec does."""
    (agent,) = (pid for pid in wire.descendants(first.process.pid) if wire.process_state(pid)[1] == first.process.pid)
    inside = [PYTHON, "-I", "-S", str(AGENT), "control", "--socket", str(first.socket)]
    command = ["nsenter", "--target", str(agent), "--pid", "--mount", *inside]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as helper:
        try:
            yield helper
        finally:
            helper.kill()


def frame(helper: subprocess.Popen[bytes]) -> tuple[int, wire.Json]:
    """The next frame of the helper that is no PING."""
    assert helper.stdout is not None
    while True:
        kind, length, _ = wire.HEADER.unpack(helper.stdout.read(wire.HEADER.size))
        payload = helper.stdout.read(length)
        if kind != wire.PING:
            return kind, wire.decode_json(payload)


def ask(helper: subprocess.Popen[bytes], kind: int, value: wire.Json) -> wire.Json:
    """Send a frame and await the reply."""
    assert helper.stdin is not None
    helper.stdin.write(wire.encode_frame(kind, 1, wire.encode_json(value)))
    helper.stdin.flush()
    kind, reply = frame(helper)
    assert kind == wire.REPLY
    return reply


def test_orphans_are_adopted_reaped_and_ended(first: AgentProcess) -> None:
    """PID 1 has every orphan; it leaves neither zombies nor survivors."""
    terminal = Terminal(first)
    printed = terminal.run("echo $PPID; (sleep 0.01 &); setsid sleep 300 & disown; sleep 0.1; ps -eo stat,args")[1]
    assert printed.startswith(b"1\r\n")
    assert b"\nZ" not in printed
    survivors = wire.descendants(first.process.pid)
    terminal.submit("exit 4")
    assert terminal.stream.until_end() == "ended"
    assert first.process.wait(10) == 0
    wait_until(lambda: all(wire.process_state(pid)[0] in ("", "Z") for pid in survivors))


def test_nobody_inside_keeps_a_helper_out(first: AgentProcess) -> None:
    """Silent connections of user code push out each other, never what came from outside."""
    terminal = Terminal(first)
    script = f"""
import socket, time
kept = []
for _ in range(200):
    s = socket.socket(socket.AF_UNIX)
    s.connect({str(first.socket)!r})
    kept.append(s)
print("flooded", flush=True)
time.sleep(300)
"""
    with helper_from_outside(first) as helper:
        kind, hello = frame(helper)
        assert kind == wire.HELLO
        terminal.submit(f"python3 -c {wire.quoted(script)}")
        terminal.stream.until_text(b"\nflooded\r\n")
        terminal.control.request("status")
        assert ask(helper, wire.CONTROL, {"proof": wire.control_proof(KEY, hello["challenge"])})["ok"]


def test_a_helper_outlives_the_session_until_its_end_is_told(first: AgentProcess) -> None:
    """Ending what the user left behind does not cut the streams that carry the end."""
    terminal = Terminal(first)
    with helper_from_outside(first) as helper:
        _, hello = frame(helper)
        assert ask(helper, wire.CONTROL, {"proof": wire.control_proof(KEY, hello["challenge"])})["ok"]
        terminal.stream.acking = False
        terminal.submit("exit")
        terminal.stream.until_mark("ended")
        assert ask(helper, wire.REQUEST, {"op": "status"})["state"] == "ended"
