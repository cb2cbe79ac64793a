"""Blocking clients with as little between the caller and the socket as can be: HTTP/1.1, server-sent events, WebSocket.

Every terminal is measured with these, so that what differs is the server. A blocking read wakes up sooner than an event
loop does, and there is nothing else for the client to do.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import time
from typing import Any

READ_BYTES = 256 * 1024
IDLE_SECONDS = 3.0  # servers close a keep-alive connection that is not used; ours after five
PATIENCE = 60.0  # seconds without a byte after which a benchmark fails


class Closed(Exception):
    """The server ended the connection."""


class Buffered:
    """A TCP connection to this machine that is read into a buffer."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connect()

    def _connect(self) -> None:
        self.socket = socket.create_connection(("127.0.0.1", self._port), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray()

    def send(self, data: bytes) -> None:
        """Write all of it."""
        self.socket.sendall(data)

    def until(self, mark: bytes) -> bytes:
        """Everything up to and with `mark`."""
        searched = 0
        while (at := self._buffer.find(mark, searched)) < 0:
            searched = max(0, len(self._buffer) - len(mark))
            self._fill()
        return self.exactly(at + len(mark))

    def exactly(self, size: int) -> bytes:
        """The next `size` bytes."""
        while len(self._buffer) < size:
            self._fill()
        with memoryview(self._buffer) as view:
            data = bytes(view[:size])
        del self._buffer[:size]
        return data

    def close(self) -> None:
        """End the connection."""
        self.socket.close()

    def _fill(self) -> None:
        data = self.socket.recv(READ_BYTES)
        if not data:
            raise Closed
        self._buffer += data


class Http(Buffered):
    """One keep-alive connection to the functions, with an access token."""

    def __init__(self, port: int, token: str) -> None:
        super().__init__(port)
        self._head = f"HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {token}\r\n"
        self._used = time.monotonic()

    def freshen(self) -> None:
        """Connect again if the server may be about to hang up; only between an answer and the next request."""
        if time.monotonic() - self._used > IDLE_SECONDS:
            self.close()
            self._connect()
            self._used = time.monotonic()

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> None:
        """Send a request; `answer` reads what comes back."""
        content = b"" if body is None else json.dumps(body).encode()
        self._used = time.monotonic()
        kind = "" if body is None else "Content-Type: application/json\r\n"
        self.send(f"{method} {path} {self._head}{kind}Content-Length: {len(content)}\r\n\r\n".encode() + content)

    def answer(self) -> dict[str, Any]:
        """The JSON of a response. Raises AssertionError for any status that is no success."""
        head = self.until(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
        content = self.exactly(int(length))
        assert head.startswith(b"HTTP/1.1 2"), f"{head[:40]!r} {content!r}"
        value: dict[str, Any] = json.loads(content)
        return value

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask and wait for the answer."""
        self.freshen()
        self.ask(method, path, body)
        return self.answer()


class Events(Http):
    """Server-sent events of one response."""

    def __init__(self, port: int, token: str) -> None:
        super().__init__(port, token)
        self._text = bytearray()

    def open(self, path: str) -> None:
        """Ask for the stream and read the response's head."""
        self.ask("GET", path)
        head = self.until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head

    def next(self) -> tuple[bytes, dict[str, Any]]:
        """The next event, as (name, value)."""
        while True:
            searched = 0
            while (at := self._text.find(b"\n\n", searched)) < 0:
                searched = max(0, len(self._text) - 1)
                self._text += self._chunk()
            block = bytes(self._text[:at])
            del self._text[: at + 2]
            name, data = b"message", b""
            for line in block.split(b"\n"):
                if line.startswith(b"data: "):
                    data = line[6:]
                elif line.startswith(b"event: "):
                    name = line[7:]
            if data:
                return name, json.loads(data)

    def _chunk(self) -> bytes:
        """One chunk of the transfer encoding."""
        size = int(self.until(b"\r\n"), 16)
        if size == 0:
            raise Closed
        return self.exactly(size + 2)[:-2]


class WebSocket(Buffered):
    """The client's side of RFC 6455, as far as these servers use it: whole messages, pings, no extensions."""

    MASK = b"\0\0\0\0"  # a mask that changes nothing is a valid one, and costs nothing

    def __init__(self, port: int, path: str, protocol: str = "") -> None:
        super().__init__(port)
        key = base64.b64encode(os.urandom(16)).decode()
        wanted = f"Sec-WebSocket-Protocol: {protocol}\r\n" if protocol else ""
        self.send(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n{wanted}\r\n".encode()
        )
        head = self.until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101"), head

    def write(self, data: bytes, opcode: int = 1) -> None:
        """Send one message."""
        size = len(data)
        length = struct.pack("!B", 0x80 | size) if size < 126 else struct.pack("!BH", 0x80 | 126, size)
        self.send(bytes((0x80 | opcode,)) + length + self.MASK + data)

    def read(self) -> bytes:
        """The next message."""
        while True:
            first, size = self.exactly(2)
            if size == 126:
                (size,) = struct.unpack("!H", self.exactly(2))
            elif size == 127:
                (size,) = struct.unpack("!Q", self.exactly(8))
            data = self.exactly(size)
            opcode = first & 0x0F
            if opcode == 8:
                raise Closed
            if opcode == 9:
                self.write(data, opcode=10)
            elif opcode in (1, 2):
                return data
