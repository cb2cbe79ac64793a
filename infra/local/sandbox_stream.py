"""Unix sockets at any depth of the file system, and a connection to an agent as a `ByteStream`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from schemas.errors import AgentUnreachable
from schemas.ports import ByteStream

BACKLOG = 128
BUSY_SECONDS = 0.01  # between two attempts while the agent's backlog is full
BUSY_ATTEMPTS = 200


class UnixStream(ByteStream):
    """A connection over a Unix socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, limit: int) -> bytes:
        """See the port. A connection that was reset is one that has ended."""
        try:
            return await self._reader.read(limit)
        except OSError:
            return b""

    async def write(self, data: bytes) -> None:
        """See the port."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise AgentUnreachable(f"the connection to the agent was lost: {error}") from error

    async def close(self) -> None:
        """See the port."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def listen(path: Path) -> socket.socket:
    """A listening Unix socket at this path."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _short(path) as address:
        listener.bind(address)
    listener.listen(BACKLOG)
    return listener


async def dial(path: Path) -> UnixStream | None:
    """Connect to the socket at this path; None where nobody listens. Raises AgentUnreachable when it is too busy."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        with _short(path) as address:
            await _connect(connection, address)
        reader, writer = await asyncio.open_unix_connection(sock=connection)
    except (ConnectionRefusedError, FileNotFoundError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return UnixStream(reader, writer)


async def _connect(connection: socket.socket, address: str) -> None:
    """A Unix socket connects at once or says that the backlog is full; asyncio would take the latter for success."""
    for _ in range(BUSY_ATTEMPTS):
        try:
            return connection.connect(address)
        except BlockingIOError:
            await asyncio.sleep(BUSY_SECONDS)
    raise AgentUnreachable("the agent takes no more connections")


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """An address for this path within the 108 bytes a Unix socket's may have."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
