"""Clients that are not the worker: user code has the same uid and reaches the same socket."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from consumers.agent import agent as wire
from tests.agent.client import (
    KEY,
    AgentProcess,
    Attachment,
    Connection,
    Control,
    Ended,
    RequestRefused,
    Terminal,
    agent,
    program_runs,
)

OTHER_KEY = bytes(32)


def test_the_key_is_needed_for_everything(process: AgentProcess) -> None:
    """Without the key nobody reads, acks, commands or opens again."""
    with pytest.raises(RequestRefused, match="wrong_key"):
        process.connect().open(key=OTHER_KEY)
    with pytest.raises(RequestRefused, match="wrong_key"):
        Control(process.connect(), key=OTHER_KEY)
    assert Attachment(process.connect(), key=OTHER_KEY).until_end() == "wrong_key"
    for kind in (wire.ACK, wire.ACKMARK, wire.REQUEST):
        stranger = process.connect()
        stranger.send_json(kind, 0, {"op": "stop"})
        with pytest.raises(Ended, match="protocol"):
            stranger.receive()


def test_a_proof_is_good_for_one_connection(process: AgentProcess) -> None:
    """What was overheard on one connection does not open another."""
    first, second = process.connect(), process.connect()
    proof = wire.control_proof(KEY, first.hello["challenge"])
    second.send_json(wire.CONTROL, 0, {"proof": proof})
    with pytest.raises(RequestRefused, match="wrong_key"):
        second.reply(0)


def test_a_connection_has_one_role(process: AgentProcess) -> None:
    """A control connection does not become an attachment, nor the other way round."""
    control = process.control()
    assert Attachment(control.connection).until_end() == "already_proved"
    attached = process.attach()
    attached.until(lambda: attached.statuses)
    attached.connection.send_json(wire.REQUEST, 1, {"op": "status"})
    assert attached.until_end() == "protocol"


@pytest.mark.parametrize(
    "key", ["", "00", "zz" * 32, "00" * 33, None, 7], ids=["empty", "short", "no hex", "long", "none", "number"]
)
def test_a_bad_key_opens_nothing(tmp_path: Path, key: object) -> None:
    """OPEN without a proper key is refused, and the next one may still open."""
    process = AgentProcess(tmp_path)
    try:
        connection = process.connect()
        connection.send_json(wire.OPEN, 1, {"key": key, "rows": 24, "cols": 80})
        with pytest.raises(RequestRefused, match="malformed"):
            connection.reply(1)
        connection.open()
    finally:
        process.stop()


@pytest.mark.parametrize(
    "fields",
    [
        {"rows": 0},
        {"cols": "80"},
        {"rows": 10**6},
        {"env": []},
        {"env": {"A": 1}},
        {"env": {"A=B": ""}},
        {"env": {"A": "a\0b"}},
        {"notice": 7},
        {"spoolBytes": 0},
        {"outputBytes": -1},
    ],
    ids=str,
)
def test_open_is_checked(tmp_path: Path, fields: dict[str, object]) -> None:
    """Fields that make no sense open nothing, and the next OPEN may be right."""
    process = AgentProcess(tmp_path)
    try:
        with pytest.raises(RequestRefused, match="malformed"):
            process.open(**fields)
        process.open()
    finally:
        process.stop()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"x" * 100,
        os.urandom(4096),
        wire.encode_frame(wire.OPEN, 0, b"{"),
        wire.encode_frame(wire.ATTACH, 0, b"[]"),
        wire.encode_frame(wire.CONTROL, 0, b"[" * 200_000),
        wire.encode_frame(wire.HELLO),
        wire.encode_frame(wire.PING) * 100,
        wire.encode_frame(wire.OPEN, 1, wire.encode_json({"key": "00" * 32})) * 10,
        wire.HEADER.pack(wire.OPEN, wire.MAX_STRANGER_BYTES + 1, 0),
        wire.HEADER.pack(wire.OPEN, 0xFFFFFFFF, 0),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_garbage_ends_its_own_connection_only(terminal: Terminal, data: bytes) -> None:
    """Whatever a stranger sends, the stranger is told to go and the session goes on."""
    stranger = terminal.process.connect()
    with contextlib.suppress(OSError):
        stranger.sock.sendall(data)
    with pytest.raises(Ended):
        _listen(stranger)
    assert terminal.run("echo fine")[1] == b"fine\r\n"


def _listen(connection: Connection) -> None:
    while True:
        connection.receive()


def test_a_frame_over_the_limit_ends_a_control_connection(terminal: Terminal) -> None:
    """Even who has the key cannot make the agent buffer without end."""
    control = terminal.process.control()
    control.connection.sock.sendall(wire.HEADER.pack(wire.REQUEST, wire.MAX_PAYLOAD + 1, 1))
    with pytest.raises(Ended, match="protocol"):
        control.connection.receive()


def test_strangers_are_shown_out(tmp_path: Path) -> None:
    """Who proves nothing in time is closed."""
    with agent(tmp_path, "--stranger", "0.2") as process:
        stranger, worker = process.connect(), process.control()
        with pytest.raises(Ended, match="too_slow"):
            stranger.receive()
        assert worker.request("status")["ok"]


@pytest.mark.slow
def test_many_strangers_keep_no_worker_out(tmp_path: Path) -> None:
    """Hundreds of silent connections are bounded, and a worker still gets in and is served."""
    with agent(tmp_path) as process:
        strangers = []
        for _ in range(500):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(process.socket))
            strangers.append(sock)
        terminal = Terminal(process)
        assert terminal.run("echo in")[1] == b"in\r\n"
        descriptors = len(os.listdir(f"/proc/{process.process.pid}/fd"))
        assert descriptors < wire.MAX_STRANGERS + 20
        for sock in strangers:
            sock.close()


@pytest.mark.slow
def test_connections_from_user_code_do_not_disturb(terminal: Terminal) -> None:
    """A program in the sandbox that connects in a loop keeps nobody from working."""
    path = str(terminal.process.socket)
    script = f"""
import socket
kept = []
while True:
    s = socket.socket(socket.AF_UNIX)
    try:
        s.connect({path!r})
        s.send(b"garbage" * 9)
    except OSError:
        pass
    kept = kept[-50:] + [s]
"""
    command = terminal.submit(f"python3 -c {wire.quoted(script)}")
    terminal.stream.until_mark("started", command)
    program_runs(terminal.process, "python3")
    for _ in range(20):
        with process_control(terminal.process) as control:
            assert control.request("status")["commandId"] == command
    terminal.control.signal("INT")
    assert terminal.stream.until_mark("finished", command)["outcome"] == "exited"


@contextlib.contextmanager
def process_control(process: AgentProcess) -> Iterator[Control]:
    """A control connection of its own, tried again while strangers push it out before it has proved itself."""
    for _ in range(200):
        try:
            control = process.control()
        except (Ended, OSError):
            continue
        yield control
        control.connection.close()
        return
    raise Ended("kept out")


def test_a_client_that_never_reads_its_answers_is_bounded(process: AgentProcess) -> None:
    """Answers wait for their reader in bounded memory; the rest of its requests stay in its own socket."""
    control = process.control()
    (process.workspace / "big").write_bytes(b"x" * 1_000_000)
    connection: Connection = control.connection
    connection.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        _ask_for_ever(connection)
    assert process.control().request("status")["ok"]
    resident = int(Path(f"/proc/{process.process.pid}/statm").read_text().split()[1]) * 4096
    assert resident < 60_000_000


def _ask_for_ever(connection: Connection) -> None:
    while True:
        connection.sock.send(wire.encode_frame(wire.REQUEST, 1, b'{"op":"read","path":"big"}'))


def test_pings_are_answered_and_silence_is_noticed(tmp_path: Path) -> None:
    """Both sides know within the silence time that the other is gone."""
    with agent(tmp_path, "--keepalive", "0.1", "--silence", "0.4") as process:
        control = process.control()
        connection = control.connection
        for kind in (wire.PING, wire.PONG):
            connection.sock.sendall(wire.encode_frame(kind, 77))
        data = b""
        while wire.encode_frame(wire.PONG, 77) not in data:
            data += connection.sock.recv(1_000)
        while data := connection.sock.recv(1_000):
            assert set(data) <= set(wire.encode_frame(wire.PING, 0))
        assert data == b""
