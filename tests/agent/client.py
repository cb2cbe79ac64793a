"""A small blocking client of the agent, and agents as real processes, for the tests of this folder."""

from __future__ import annotations

import base64
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from consumers.agent import agent as wire

AGENT = Path(wire.__file__)
PYTHON = os.environ.get("AGENT_PYTHON", sys.executable)  # what runs the agents: any Python from 3.8 on
KEY = bytes(range(32))
PATIENCE = 30.0  # seconds until a condition that never comes true fails a test

Json = dict[str, Any]


class RequestRefused(Exception):
    """The agent refused a request; `code` is its own, `reply` all it said."""

    def __init__(self, reply: Json) -> None:
        super().__init__(f"{reply['code']}: {reply['message']}")
        self.code: str = reply["code"]
        self.reply = reply


class Ended(Exception):
    """The agent ended the connection (`code` is what END said, "" for a bare close)."""

    def __init__(self, code: str = "") -> None:
        super().__init__(code)
        self.code = code


class Connection:
    """Frames on one socket. PINGs are answered on the way."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        self.sock = sock
        self._decoder = wire.FrameDecoder()
        self._frames: list[tuple[int, int, bytes]] = []
        kind, _, payload = self.receive()
        assert kind == wire.HELLO
        self.hello: Json = json.loads(payload)

    def receive(self) -> tuple[int, int, bytes]:
        """The next frame. Raises Ended."""
        while True:
            while not self._frames:
                data = self._read()
                self._frames.extend(self._decoder.feed(data))
            kind, argument, payload = self._frames.pop(0)
            if kind == wire.PING:
                self.send(wire.PONG, argument)
            elif kind == wire.END:
                raise Ended(json.loads(payload)["code"])
            elif kind != wire.PONG:
                return kind, argument, payload

    def _read(self) -> bytes:
        try:
            data = self.sock.recv(256 * 1024)
        except ConnectionError:
            data = b""
        if not data:
            raise Ended
        return data

    def send(self, kind: int, argument: int = 0, payload: bytes = b"") -> None:
        """Write one frame."""
        self.sock.sendall(wire.encode_frame(kind, argument, payload))

    def send_json(self, kind: int, argument: int, value: Json) -> None:
        """Write one frame with a JSON payload."""
        self.send(kind, argument, json.dumps(value).encode())

    def reply(self, request: int) -> Json:
        """The REPLY to a request. Raises RequestRefused."""
        while True:
            kind, argument, payload = self.receive()
            if kind == wire.REPLY and argument == request:
                reply: Json = json.loads(payload)
                if not reply["ok"]:
                    raise RequestRefused(reply)
                return reply

    def open(self, key: bytes = KEY, **fields: Any) -> Json:
        """Open the session."""
        self.send_json(wire.OPEN, 7, {"key": key.hex(), "rows": 24, "cols": 80, **fields})
        return self.reply(7)

    def close(self) -> None:
        """End the connection."""
        self.sock.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Attachment:
    """A reader of the stream that checks that it has no hole, and acks what it got unless told not to."""

    def __init__(
        self,
        connection: Connection,
        epoch: int = 1,
        offset: int = 0,
        mark: int | None = 0,
        key: bytes = KEY,
        acking: bool = True,
    ) -> None:
        self.connection = connection
        self.acking = acking
        self.start = self.position = offset
        self.data = bytearray()
        self.gaps: list[tuple[int, int]] = []
        self.marks: list[Json] = []
        self.last_mark = mark
        self.statuses: list[Json] = []
        self.echoed = bytearray()
        proof = wire.attach_proof(key, connection.hello["challenge"], epoch, offset, mark)
        connection.send_json(wire.ATTACH, 0, {"proof": proof, "epoch": epoch, "from": offset, "fromMark": mark})

    def step(self) -> None:
        """Take one frame in."""
        kind, argument, payload = self.connection.receive()
        if kind in (wire.OUT, wire.ECHO):
            self._advance(argument, len(payload))
            self.data += payload
            if kind == wire.ECHO:
                self.echoed += payload
        elif kind == wire.GAP:
            gap = json.loads(payload)
            assert gap["reason"] == "output_budget"
            self._advance(argument, gap["length"])
            self.gaps.append((argument, gap["length"]))
        elif kind == wire.MARK:
            self._take_mark(argument, json.loads(payload))
        elif kind == wire.STATUS:
            self.statuses.append(json.loads(payload))

    def _advance(self, offset: int, length: int) -> None:
        assert offset == self.position, "a hole or an overlap in the stream"
        self.position += length
        self._ack(wire.ACK, self.position)

    def _take_mark(self, sequence: int, mark: Json) -> None:
        assert self.last_mark is None or sequence == self.last_mark + 1
        assert mark["offset"] <= self.position, "a mark before its bytes"
        self.last_mark = sequence
        self.marks.append(mark)
        self._ack(wire.ACKMARK, sequence)

    def _ack(self, kind: int, argument: int) -> None:
        if self.acking:
            with suppress(ConnectionError):  # closed meanwhile; why is still to be read
                self.connection.send(kind, argument)

    def until(self, condition: Callable[[], Any]) -> Any:
        """Take frames in until the condition holds; returns what it returned."""
        deadline = time.monotonic() + PATIENCE
        while not (result := condition()):
            assert time.monotonic() < deadline, f"in vain; the stream ends with {bytes(self.data[-300:])!r}"
            self.step()
        return result

    def until_text(self, text: bytes, start: int = 0) -> int:
        """Read until `text` shows after `start`; returns the position after it."""
        self.until(lambda: self.data.find(text, start) >= 0)
        return self.data.find(text, start) + len(text)

    def until_mark(self, kind: str, command: str | None = None) -> Json:
        """Read until a mark of this kind (of this command) is there."""
        mark: Json = self.until(lambda: self.find_mark(kind, command))
        return mark

    def find_mark(self, kind: str, command: str | None = None) -> Json | None:
        """The mark of this kind (of this command), if it came."""
        found = (m for m in self.marks if m["kind"] == kind and command in (None, m.get("commandId")))
        return next(found, None)

    def between(self, start: int, end: int) -> bytes:
        """The bytes of this part of the stream."""
        return bytes(self.data[start - self.start : end - self.start])

    def until_end(self) -> str:
        """Read until the agent ends the connection; returns the code it gave."""
        try:
            while True:
                self.step()
        except Ended as end:
            return end.code


class Control:
    """Requests to the agent, one at a time."""

    def __init__(self, connection: Connection, key: bytes = KEY) -> None:
        self.connection = connection
        self._ids = itertools.count(1)
        proof = wire.control_proof(key, connection.hello["challenge"])
        connection.send_json(wire.CONTROL, 0, {"proof": proof})
        connection.reply(0)

    def request(self, op: str, **fields: Any) -> Json:
        """Ask and await the answer. Raises RequestRefused."""
        number = next(self._ids)
        self.connection.send_json(wire.REQUEST, number, {"op": op, **fields})
        return self.connection.reply(number)

    def input(self, data: bytes, id: str = "") -> Json:
        """Type into the terminal."""
        return self.request("input", id=id or os.urandom(8).hex(), data=base64.b64encode(data).decode())

    def signal(self, name: str) -> Json:
        """Signal the foreground."""
        return self.request("signal", id=os.urandom(8).hex(), name=name)


class AgentProcess:
    """An agent that serves a socket in `directory`, as a process of its own."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        python: str = PYTHON,
        script: Path = AGENT,
        user: int | None = None,
        before: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self.workspace = directory / "w"
        self.run_dir = directory / "r"
        self.socket = directory / "s"
        for path in (self.workspace, self.run_dir):
            path.mkdir(exist_ok=True)
            if user is not None:
                os.chown(path, user, user)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.socket))
        self._listener.listen(128)
        fd = self._listener.fileno()
        paths = ["--workspace", str(self.workspace), "--run-dir", str(self.run_dir)]
        command = [*before, python, "-I", "-S", str(script), "serve", "--listen-fd", str(fd), *paths, *arguments]
        env = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        self.process = subprocess.Popen(command, pass_fds=(fd,), env=env, user=user, group=user)
        self._listener.close()
        self._connections: list[Connection] = []

    def connect(self) -> Connection:
        """A new connection."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.socket))  # blocking: with a time-out a full backlog is an error
        connection = Connection(sock)
        self._connections.append(connection)
        return connection

    def open(self, **fields: Any) -> None:
        """Open the session."""
        with self.connect() as connection:
            connection.open(**fields)

    def attach(self, epoch: int = 1, offset: int = 0, mark: int | None = 0, acking: bool = True) -> Attachment:
        """A new attachment."""
        return Attachment(self.connect(), epoch, offset, mark, acking=acking)

    def control(self) -> Control:
        """A new control connection."""
        return Control(self.connect())

    def stop(self) -> None:
        """Kill it, if it is still there, and leave nothing behind, connections included."""
        for connection in self._connections:
            connection.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@contextmanager
def agent(directory: Path, *arguments: str, **fields: Any) -> Iterator[AgentProcess]:
    """A running agent whose session is open."""
    process = AgentProcess(directory, *arguments)
    try:
        process.open(**fields)
        yield process
    finally:
        process.stop()


class Terminal:
    """An opened agent with an attachment and a control connection: what most tests need."""

    def __init__(self, process: AgentProcess) -> None:
        self.process = process
        self.stream = process.attach()
        self.control = process.control()
        self._numbers = itertools.count(1)

    def submit(self, text: str, command: str = "", **fields: Any) -> str:
        """Submit a command; returns its id."""
        number = next(self._numbers)
        command = command or f"c{number}"
        self.control.request("run", number=number, commandId=command, text=text, **fields)
        return command

    def run(self, text: str, **fields: Any) -> tuple[Json, bytes]:
        """Run a command; returns its finished mark and what it printed."""
        mark = self.stream.until_mark("finished", self.submit(text, **fields))
        if mark["startOffset"] is None:
            return mark, b""
        self.stream.until(lambda: self.stream.position >= mark["offset"])
        return mark, self.stream.between(mark["startOffset"], mark["offset"])


def program_runs(process: AgentProcess, name: str) -> int:
    """Wait until a program of this name runs below the agent, and has the terminal then; returns its pid."""

    def is_there(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/comm").read_text() == f"{name}\n"
        except OSError:
            return False

    pid: int = wait_until(lambda: next(filter(is_there, wire.descendants(process.process.pid)), None))
    return pid


def wait_until(condition: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Wait for something outside of the stream (a process, a file) to become true; returns what it returned."""
    deadline = time.monotonic() + patience
    while not (result := condition()):
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.005)
    return result
