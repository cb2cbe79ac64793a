"""What the parts do by themselves: the whole cannot be faster than these."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import itertools
import json
import os
import pty
import socket
import sqlite3
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import consumers.agent.agent as wire
from bench.pigeon import ROOM, Stack
from bench.processes import cpu_seconds
from bench.report import AGENT, OURS, Figure, latencies, median
from bench.sockets import PATIENCE, READ_BYTES, Closed
from bench.terminals import Terminal, calm
from infra.local.database import Database
from infra.local.sandbox_record import OF, Record
from infra.local.sandboxes import LocalSandboxes
from infra.local.store import LocalStore
from schemas.documents import INDEXES, Chunk, chunk_path
from schemas.limits import MIB, Limits
from schemas.ports import SandboxSpec

KEY = bytes(range(32))


class Frames:
    """A connection to an agent."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(str(path))
        self._decoder = wire.FrameDecoder()
        self._frames: deque[tuple[int, int, bytes]] = deque()
        self.challenge = str(json.loads(self.next(wire.HELLO)[1])["challenge"])

    def next(self, *kinds: int) -> tuple[int, bytes]:
        """The argument and the payload of the next frame of one of these kinds; others are passed over."""
        while True:
            while not self._frames:
                data = self._socket.recv(READ_BYTES)
                if not data:
                    raise Closed
                self._frames.extend(self._decoder.feed(data))
            kind, argument, payload = self._frames.popleft()
            if kind in kinds:
                return argument, payload

    def send(self, kind: int, argument: int, value: dict[str, Any] | None = None) -> None:
        """Write a frame with a JSON payload, or with none."""
        payload = b"" if value is None else json.dumps(value).encode()
        self._socket.sendall(wire.HEADER.pack(kind, len(payload), argument) + payload)

    def proof(self, claim: str) -> str:
        """What proves the key over this connection."""
        return hmac.new(KEY, f"{self.challenge}:{claim}".encode(), hashlib.sha256).hexdigest()

    def close(self) -> None:
        """End the connection."""
        self._socket.close()


class AgentTerminal:
    """The agent in its sandbox over its socket, without bus, store and functions."""

    name = AGENT

    def __init__(self, record: Record) -> None:
        self._record = record
        path = record.directory / "agent.sock"
        self._stream, self._control = Frames(path), Frames(path)
        self._numbers, self._commands = itertools.count(1), itertools.count(1)
        self._asked = 0
        room = {"outputBytes": ROOM["output_bytes"], "spoolBytes": Limits().spool_bytes}
        self._stream.send(wire.OPEN, 0, {"key": KEY.hex(), "rows": 24, "cols": 80, **room})
        self._stream.next(wire.REPLY)
        claim = {"epoch": 1, "from": 0, "fromMark": None}
        self._stream.send(wire.ATTACH, 0, {"proof": self._stream.proof("attach:1:0:"), **claim})
        self._control.send(wire.CONTROL, 0, {"proof": self._control.proof("control")})
        self._control.next(wire.REPLY)

    def type(self, data: bytes) -> None:
        """See Terminal.type."""
        self._request("input", id=str(next(self._numbers)), data=base64.b64encode(data).decode())

    def run(self, command: str) -> None:
        """See Terminal.run."""
        number = next(self._commands)
        self._request("run", number=number, commandId=str(number), text=command, timeoutSeconds=600)

    def receive(self) -> bytes:
        """See Terminal.receive."""
        offset, payload = self._stream.next(wire.OUT, wire.ECHO)
        self._stream.send(wire.ACK, offset + len(payload))
        return payload

    def settle(self) -> None:
        """See Terminal.settle."""
        if self._asked:
            self._asked = 0
            _, reply = self._control.next(wire.REPLY)
            assert json.loads(reply)["ok"], reply

    def roots(self) -> list[int]:
        """See Terminal.roots."""
        processes = (self._record.process("init"), self._record.process("monitor"))
        return [process.pid for process in processes if process is not None]

    def close(self) -> None:
        """See Terminal.close."""
        self._stream.close()
        self._control.close()

    def _request(self, op: str, **fields: Any) -> None:
        self.settle()
        self._asked = next(self._numbers)
        self._control.send(wire.REQUEST, self._asked, {"op": op, **fields})


@contextmanager
def agent(folder: Path, python: Path) -> Iterator[Terminal]:
    """An agent in a sandbox like those of the stack, at its prompt."""
    limits = Limits()
    sandboxes = LocalSandboxes(folder / "sandboxes", limits=limits, python=python)
    spec = SandboxSpec(
        name="floor",
        session="floor",
        memory_bytes=limits.memory_bytes,
        workspace_bytes=limits.workspace_bytes,
        processes=limits.processes,
        file_bytes=limits.file_bytes,
        lifetime_seconds=3600,
    )
    sandbox = asyncio.run(sandboxes.create(spec))
    try:
        terminal = AgentTerminal(Record(folder / "sandboxes" / f"{sandbox.name}{OF}{sandbox.uid}"))
        calm(terminal)
        yield terminal
        terminal.close()
    finally:
        asyncio.run(sandboxes.delete(sandbox.name, sandbox.uid))


def raw_pty(last: int) -> tuple[float, float]:
    """`seq 1 LAST` on a PTY that is read and thrown away: the seconds, and the CPU seconds of both."""
    master, slave = pty.openpty()
    used = cpu_seconds([os.getpid()])
    began = time.perf_counter()
    with subprocess.Popen(["seq", "1", str(last)], stdin=slave, stdout=slave):
        os.close(slave)
        try:
            while os.read(master, 65_536):
                pass
        except OSError:  # the other side is closed
            pass
    seconds = time.perf_counter() - began
    os.close(master)
    return seconds, cpu_seconds([os.getpid()]) - used


def measure(stack: Stack, folder: Path, *, count: int) -> Iterator[Figure]:
    """A request that does nothing, a commit that does little, and the chunk that every echo waits for."""
    yield from latencies("HTTP request that does nothing", {OURS: _requests(stack, count)})
    folder.mkdir()
    yield from latencies("SQLite insert and commit, bare", {OURS: _inserts(folder / "bare.db", count)})
    yield from latencies("create of a small chunk in the store", {OURS: asyncio.run(_creates(folder, b"z", count))})
    large = median(asyncio.run(_creates(folder / "large", os.urandom(MIB // 4), count // 10)))
    yield Figure("create of 256 KiB chunks in the store", "MB/s", {OURS: MIB / 4 / 1e6 / large})


def _requests(stack: Stack, count: int) -> list[float]:
    http = stack.http()
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        http.call("GET", "/healthz")
        seconds.append(time.perf_counter() - began)
    http.close()
    return seconds


def _inserts(path: Path, count: int) -> list[float]:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("CREATE TABLE t (id TEXT PRIMARY KEY, body BLOB) WITHOUT ROWID")
    seconds = []
    for number in range(count):
        began = time.perf_counter()
        connection.execute("INSERT INTO t VALUES (?, ?)", (f"{number:016d}", b"x" * 100))
        seconds.append(time.perf_counter() - began)
    connection.close()
    return seconds


async def _creates(folder: Path, data: bytes, count: int) -> list[float]:
    now = datetime.now(UTC)
    seconds = []
    async with Database(folder / "store.db") as database:
        store = LocalStore(database, indexes=INDEXES)
        for number in range(count):
            chunk = Chunk(offset=number * len(data), data=data, at=now, expire_at=now).fields()
            began = time.perf_counter()
            await store.create(chunk_path("sessions/floor", number * len(data)), chunk)
            seconds.append(time.perf_counter() - began)
    return seconds
