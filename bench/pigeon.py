"""The system under test: a whole embedded stack as `pigeon up` starts it, and its sessions as terminals."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from bench.sockets import Closed, Events, Http
from infra.local.keys import token_secret
from infra.local.presence import find
from infra.local.sandbox_record import Record
from infra.runtimes import SANDBOXES_FOLDER
from producers.identity import sign_local_token
from schemas.limits import MIB
from schemas.ports import Phase

START_SECONDS = 60.0
LOOK_SECONDS = 0.01
ROOM: dict[str, Any] = {"output_bytes": 1024 * MIB, "sessions_per_user": 100, "capacity": 100}


class Stack:
    """A running stack on a state folder of its own."""

    def __init__(self, state: Path, process: subprocess.Popen[bytes], port: int) -> None:
        self.state = state
        self.pid = process.pid
        self.port = port
        self.token = sign_local_token(token_secret(state), "bench", timedelta(hours=1))

    def log(self) -> str:
        """What it printed."""
        return (self.state.parent / "log").read_text(errors="replace")

    def http(self) -> Http:
        """A keep-alive connection to its functions."""
        return Http(self.port, self.token)

    def events(self) -> Events:
        """A connection for one stream."""
        return Events(self.port, self.token)

    def records(self) -> list[Record]:
        """Its sandboxes."""
        return [Record(path) for path in sorted((self.state / SANDBOXES_FOLDER).glob("[!.]*"))]

    def roots_of(self, session: str | None) -> list[int]:
        """The processes of a session's sandbox; of the warm ones for None."""
        roots = []
        for record in self.records():
            meta = record.meta()
            if meta is not None and meta.session == session:
                found = (record.process("init"), record.process("monitor"))
                roots += [process.pid for process in found if process is not None]
        return roots

    def await_warm(self) -> None:
        """Return once a warm sandbox is there and its agent listens."""
        deadline = time.monotonic() + START_SECONDS
        while not any(self._is_warm(record) for record in self.records()):
            assert time.monotonic() < deadline, f"no warm sandbox came up: {self.log()}"
            time.sleep(LOOK_SECONDS)

    @staticmethod
    def _is_warm(record: Record) -> bool:
        sandbox = record.look()
        return sandbox is not None and sandbox.session is None and sandbox.phase is Phase.RUNNING


@contextmanager
def stack(folder: Path, python: Path, *, emulators: Mapping[str, str] | None = None, **limits: Any) -> Iterator[Stack]:
    """A stack with these limits beside ROOM, whose sandboxes offer this Python; stopped, with all its sessions, on
    the way out. `emulators` are the variables with which it finds them; without, it is an embedded one."""
    state = folder / "state"
    settings = {"STATE": str(state), "PYTHON": str(python), "LIMITS": json.dumps({**ROOM, **limits})}
    environment = {**os.environ, **{f"PIGEON_{name}": value for name, value in settings.items()}, **(emulators or {})}
    folder.mkdir()
    with (folder / "log").open("wb") as output:
        command = [sys.executable, "-m", "infra.cli", "up", "--port", "0"]
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield Stack(state, process, _port(state, process))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def _port(state: Path, process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        presence = find(state)
        if presence is not None and presence.port is not None:
            return presence.port
        time.sleep(LOOK_SECONDS)
    raise AssertionError(f"the stack did not start: {(state.parent / 'log').read_text(errors='replace')}")


class Session:
    """One session as a terminal: input by POST, output by one stream of server-sent events."""

    name = "pigeon"

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._http = stack.http()
        self._events = stack.events()
        self._asked = False
        self.offset = 0  # after everything received
        self.id = ""
        self._early: list[bytes] = []

    def start(self) -> None:
        """Create it; returns once the stream says that it is ready."""
        self.id = self._http.call("POST", "/terminal-create-session", {})["sessionId"]
        self._events.open(f"/terminal-stream-output/{self.id}")
        while True:
            name, value = self._events.next()
            if name == b"message":
                self._early.append(self._taken(value))
            elif name == b"state" and value["status"] == "ready":
                return

    def type(self, data: bytes) -> None:
        """See Terminal.type."""
        body = {"sessionId": self.id, "data": base64.b64encode(data).decode(), "encoding": "base64"}
        self._post("/terminal-send-input", body)

    def run(self, command: str) -> None:
        """See Terminal.run."""
        self._post("/terminal-execute-command", {"sessionId": self.id, "command": command})

    def receive(self) -> bytes:
        """See Terminal.receive."""
        if self._early:
            return self._early.pop(0)
        while True:
            name, value = self._events.next()
            if name == b"message":
                return self._taken(value)
            assert name == b"state", (name, value)

    def settle(self) -> None:
        """See Terminal.settle."""
        if self._asked:
            self._asked = False
            self._http.answer()

    def roots(self) -> list[int]:
        """See Terminal.roots."""
        return [self._stack.pid, *self._stack.roots_of(self.id)]

    def close(self) -> None:
        """End the session, and return once it has ended."""
        self.settle()
        self._http.call("DELETE", f"/terminal-cleanup-session/{self.id}")
        try:
            while self._events.next()[0] != b"end":
                pass
        except Closed:
            pass
        self._events.close()
        self._http.close()

    def _post(self, path: str, body: dict[str, Any]) -> None:
        self.settle()
        self._http.freshen()
        self._http.ask("POST", path, body)
        self._asked = True

    def _taken(self, value: dict[str, Any]) -> bytes:
        assert value["offset"] == self.offset, "a gap or a double in the transcript"
        data = base64.b64decode(value["data"])
        self.offset += len(data)
        return data
