"""Terminals of other projects, each a server of its own process on this machine, without a sandbox or a transcript."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bench.sockets import WebSocket
from bench.terminals import Terminal, calm

START_SECONDS = 20.0
LOOK_SECONDS = 0.02


class Terminado:
    """terminado: JSON in WebSocket messages."""

    def __init__(self, name: str, pid: int, port: int) -> None:
        self.name = name
        self._pid = pid
        self._socket = WebSocket(port, "/ws")

    def type(self, data: bytes) -> None:
        """See Terminal.type."""
        self._socket.write(json.dumps(["stdin", data.decode()]).encode())

    def run(self, command: str) -> None:
        """See Terminal.run."""
        self.type(command.encode() + b"\r")

    def receive(self) -> bytes:
        """See Terminal.receive."""
        while True:
            kind, value = json.loads(self._socket.read())
            if kind == "stdout":
                return str(value).encode()

    def settle(self) -> None:
        """See Terminal.settle."""

    def roots(self) -> list[int]:
        """See Terminal.roots."""
        return [self._pid]

    def close(self) -> None:
        """See Terminal.close."""
        self._socket.close()


class Ttyd:
    """ttyd: bytes in WebSocket messages, the first one saying what they are."""

    name = "ttyd"

    def __init__(self, pid: int, port: int) -> None:
        self._pid = pid
        self._socket = WebSocket(port, "/ws", "tty")
        self._socket.write(b'{"AuthToken":"","columns":80,"rows":24}', opcode=2)

    def type(self, data: bytes) -> None:
        """See Terminal.type."""
        self._socket.write(b"0" + data, opcode=2)

    def run(self, command: str) -> None:
        """See Terminal.run."""
        self.type(command.encode() + b"\r")

    def receive(self) -> bytes:
        """See Terminal.receive."""
        while True:
            message = self._socket.read()
            if message[:1] == b"0" and len(message) > 1:
                return message[1:]

    def settle(self) -> None:
        """See Terminal.settle."""

    def roots(self) -> list[int]:
        """See Terminal.roots."""
        return [self._pid]

    def close(self) -> None:
        """See Terminal.close."""
        self._socket.close()


@contextmanager
def terminado(name: str, *options: str) -> Iterator[Terminal]:
    """A terminal of terminado at its prompt."""
    port = _free_port()
    with _serving([sys.executable, "-m", "bench.terminado_server", str(port), *options], port) as pid:
        yield _at_prompt(Terminado(name, pid, port))


@contextmanager
def ttyd() -> Iterator[Terminal | None]:
    """A terminal of ttyd at its prompt; None where it is not installed."""
    program = shutil.which("ttyd")
    if program is None:
        yield None
        return
    port = _free_port()
    shell = ["bash", "--noprofile", "--norc", "-i"]
    with _serving([program, "-p", str(port), "-i", "127.0.0.1", "-W", *shell], port) as pid:
        yield _at_prompt(Ttyd(pid, port))


def _at_prompt(terminal: Terminal) -> Terminal:
    calm(terminal)
    return terminal


@contextmanager
def _serving(command: Sequence[str], port: int) -> Iterator[int]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(port):
            assert process.poll() is None, f"{command} ended"
            assert time.monotonic() < deadline, f"{command} does not listen"
            time.sleep(LOOK_SECONDS)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
