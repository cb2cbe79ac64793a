"""The helper verbs: pumps between a worker's exec stream and the agent, which never outlive their connection."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from consumers.agent import agent as wire
from tests.agent.client import AGENT, KEY, PYTHON, AgentProcess, Connection, Control, Ended


class Helper:
    """`attach` or `control` as a process, as a worker sees it: a byte stream."""

    def __init__(self, verb: str, path: Path | str, *arguments: str) -> None:
        command = [PYTHON, "-I", "-S", str(AGENT), verb, "--socket", str(path), *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    @property
    def stdin(self) -> IO[bytes]:
        """What the helper reads."""
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        """What the helper writes."""
        assert self.process.stdout is not None
        return self.process.stdout

    def receive(self) -> tuple[int, int, bytes]:
        """The next frame."""
        kind, length, argument = wire.HEADER.unpack(self.stdout.read(wire.HEADER.size))
        return kind, argument, self.stdout.read(length)

    def send(self, kind: int, argument: int = 0, payload: bytes = b"") -> None:
        """Write a frame."""
        self.stdin.write(wire.encode_frame(kind, argument, payload))
        self.stdin.flush()

    def stop(self) -> None:
        """Leave nothing behind."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.stdin, self.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                pipe and pipe.close()


@pytest.fixture
def helpers() -> Iterator[list[Helper]]:
    """Helpers put in here are ended after the test."""
    started: list[Helper] = []
    yield started
    for helper in started:
        helper.stop()


def challenge(helper: Helper) -> str:
    """The challenge of the agent that the helper reaches."""
    kind, _, payload = helper.receive()
    assert kind == wire.HELLO
    text = wire.decode_json(payload)["challenge"]
    assert isinstance(text, str)
    return text


def test_a_worker_speaks_through_the_helpers(process: AgentProcess, helpers: list[Helper]) -> None:
    """Frames pass as they are: the proof over standard input, output and replies over standard output."""
    attach, control = Helper("attach", process.socket), Helper("control", process.socket)
    helpers += [attach, control]
    claim = {"epoch": 1, "from": 0, "fromMark": None}
    proof = wire.attach_proof(KEY, challenge(attach), 1, 0, None)
    attach.send(wire.ATTACH, 0, wire.encode_json({"proof": proof, **claim}))
    control.send(wire.CONTROL, 0, wire.encode_json({"proof": wire.control_proof(KEY, challenge(control))}))
    assert control.receive()[0] == wire.REPLY
    run = {"op": "run", "number": 1, "commandId": "a", "text": "seq 1 20000"}
    control.send(wire.REQUEST, 9, wire.encode_json(run))
    assert control.receive()[:2] == (wire.REPLY, 9)
    data, finished = b"", None
    while finished is None or len(data) < finished["offset"]:
        kind, _, payload = attach.receive()
        data += payload if kind in (wire.OUT, wire.ECHO) else b""
        if kind == wire.MARK and b'"finished"' in payload:
            finished = wire.decode_json(payload)
    assert data[finished["startOffset"] : finished["offset"]].endswith(b"\n19999\r\n20000\r\n")


@pytest.mark.parametrize("verb", ["attach", "control"])
def test_a_helper_ends_with_its_input(process: AgentProcess, helpers: list[Helper], verb: str) -> None:
    """A worker that closes the exec leaves no process behind, and the agent lets the connection go."""
    helper = Helper(verb, process.socket)
    helpers.append(helper)
    challenge(helper)
    helper.stdin.close()
    assert helper.process.wait(10) == 0


def test_a_helper_ends_when_the_worker_falls_silent(process: AgentProcess, helpers: list[Helper]) -> None:
    """An exec that outlived its dropped connection hears no keepalive any more and goes."""
    helper = Helper("control", process.socket, "--silence", "0.3")
    helpers.append(helper)
    challenge(helper)
    assert helper.process.wait(10) == 0


def test_keepalives_keep_a_helper(tmp_path: Path, helpers: list[Helper]) -> None:
    """As long as both sides say something now and then, the helper stays."""
    process = AgentProcess(tmp_path, "--keepalive", "0.1")
    try:
        process.open()
        helper = Helper("control", process.socket, "--silence", "1.0")
        helpers.append(helper)
        helper.send(wire.CONTROL, 0, wire.encode_json({"proof": wire.control_proof(KEY, challenge(helper))}))
        for number in range(20):
            while helper.receive()[0] != wire.PING:
                pass
            helper.send(wire.PONG, number)
        assert helper.process.poll() is None
    finally:
        process.stop()


def test_a_helper_ends_with_the_agent_and_passes_its_last_words(process: AgentProcess, helpers: list[Helper]) -> None:
    """Why the agent closed a connection reaches the worker."""
    helper = Helper("control", process.socket)
    helpers.append(helper)
    challenge(helper)
    helper.send(wire.CONTROL, 0, wire.encode_json({"proof": wire.control_proof(KEY, "another challenge")}))
    assert wire.decode_json(helper.receive()[2])["code"] == "wrong_key"
    helper.send(99)
    assert wire.decode_json(helper.receive()[2])["code"] == "protocol"
    assert helper.process.wait(10) == 0


def test_a_helper_without_an_agent_says_so(tmp_path: Path, helpers: list[Helper]) -> None:
    """A sandbox whose agent is not there yet is an error at once, not a stream that hangs."""
    helper = Helper("attach", tmp_path / "nothing")
    helpers.append(helper)
    assert helper.process.wait(10) == 1
    assert helper.process.stderr is not None
    assert helper.process.stderr.read().startswith(b"agent attach: ")


def test_a_helper_stops_reading_when_nobody_takes_its_output(process: AgentProcess, helpers: list[Helper]) -> None:
    """A slow worker makes the helper wait, not grow."""
    helper = Helper("attach", process.socket)
    helpers.append(helper)
    claim = {"epoch": 1, "from": 0, "fromMark": None}
    proof = wire.attach_proof(KEY, challenge(helper), 1, 0, None)
    helper.send(wire.ATTACH, 0, wire.encode_json({"proof": proof, **claim}))
    process.control().request("run", number=1, commandId="a", text="seq 1 1000000; echo over >done")
    control = process.control()
    while control.request("status")["end"] < 6_000_000:
        pass
    resident = int(Path(f"/proc/{helper.process.pid}/statm").read_text().split()[1]) * 4096
    assert resident < 40_000_000


def test_an_abstract_socket_needs_no_path(tmp_path: Path, helpers: list[Helper]) -> None:
    """`@NAME` cannot be unlinked or replaced by what runs in the sandbox."""
    for path in (tmp_path / "w", tmp_path / "r"):
        path.mkdir()
    name = f"@pigeon-test-{tmp_path.name}"
    paths = ["--workspace", str(tmp_path / "w"), "--run-dir", str(tmp_path / "r")]
    command = [PYTHON, "-I", "-S", str(AGENT), "serve", "--socket", name, *paths]
    with subprocess.Popen(command) as agent:
        try:
            connection = _connect_when_there(name)
            connection.open()
            assert Control(connection).request("status")["state"] in ("idle", "busy")
            connection.close()
        finally:
            agent.kill()


def _connect_when_there(name: str) -> Connection:
    until = time.monotonic() + 30.0
    while time.monotonic() < until:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect("\0" + name[1:])
        except ConnectionRefusedError:
            sock.close()
            continue
        return Connection(sock)
    raise Ended("the agent does not listen")
