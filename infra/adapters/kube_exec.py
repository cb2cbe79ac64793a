"""A program executed in a pod, as a `ByteStream`: Kubernetes' channel protocol on a WebSocket.

The first byte of a message is its channel: 0 is standard input, 1 standard output, 2 standard error, 3 the status at
the end. Nothing is read ahead: what nobody reads stays in the socket, and the program in the pod blocks. That is also
why there is no WebSocket heartbeat: its answer would wait behind the unread bytes, and aiohttp gives up both.
Silence is noticed end to end, by the agent protocol's own keepalives.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass

import aiohttp

from schemas.errors import AgentUnreachable
from schemas.limits import KIB
from schemas.ports import ByteStream

V4, V5 = "v4.channel.k8s.io", "v5.channel.k8s.io"
PROTOCOLS = (V5, V4)
STDIN, STDOUT, STDERR, STATUS = range(4)
CLOSE_STDIN = bytes((255, STDIN))  # v5 only
OPENING_SECONDS = 15.0  # for the upgrade: the API server asks the kubelet, and that the container runtime
WRITE_SECONDS = 20.0  # that the other side may take no byte
CLOSE_SECONDS = 1.0  # for a polite end
PIECE_BYTES = 32 * KIB  # of standard input in a message, as the kubelet's own buffers
MAX_SAID = 2 * KIB  # that is kept of standard error


@dataclass(frozen=True, slots=True)
class Exit:
    """How the program ended. `code` is None where the cluster ended it, or could not start it; `message` says why."""

    code: int | None
    message: str = ""


class ExecStream(ByteStream):
    """The program's standard output and input. Without `exit` at its end the connection was lost."""

    def __init__(self, websocket: aiohttp.ClientWebSocketResponse) -> None:
        self._websocket = websocket
        self._rest = memoryview(b"")
        self._said = bytearray()
        self._closed = False
        self.exit: Exit | None = None

    @property
    def said(self) -> str:
        """What the program wrote to standard error."""
        return self._said.decode(errors="replace").strip()

    def why(self) -> str:
        """Why there is nothing to read any more."""
        if self.exit is None:
            return "the connection was cut"
        return self.said or self.exit.message or f"the helper exited with code {self.exit.code}"

    async def read(self, limit: int) -> bytes:
        """See the port. A connection that was cut is one that has ended."""
        if not await self.speaks():
            return b""
        piece, self._rest = self._rest[:limit], self._rest[limit:]
        return bytes(piece)

    async def speaks(self) -> bool:
        """Wait until there is a byte to read; False at the end."""
        while not self._rest:
            if self.exit is not None:
                return False
            message = await self._websocket.receive()
            if message.type is not aiohttp.WSMsgType.BINARY:
                return False  # closed, by whoever it was, or no exec at all
            self._take(message.data)
        return True

    def _take(self, data: bytes) -> None:
        channel, payload = data[:1], memoryview(data)[1:]
        if channel == b"\x01":
            self._rest = payload
        elif channel == b"\x02":
            self._said += payload[: MAX_SAID - len(self._said)]
        elif channel == b"\x03":
            self.exit = parse_status(bytes(payload))

    async def write(self, data: bytes) -> None:
        """See the port. A write that is cancelled half way ends the connection: what came next would be misread."""
        sent = 0
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                while sent < len(data):
                    piece = data[sent : sent + PIECE_BYTES]
                    sent += len(piece)
                    await self._websocket.send_bytes(b"\x00" + piece)
        except asyncio.CancelledError:
            if sent < len(data):
                self._closed = True
                self._abort()
            raise
        except (aiohttp.ClientError, OSError) as error:  # a time-out is an OSError; half a message may be on its way
            await self.close()
            raise AgentUnreachable(f"the connection to the pod was lost: {error!r}") from error

    async def close_after(self, seconds: float) -> None:
        """Leave a reader that long for what is on its way; an exec whose pod is gone may freeze instead of ending."""
        await asyncio.sleep(seconds)
        await self.close()

    async def close(self) -> None:
        """See the port. The program is told by the end of its input; on v4 it finds out by itself."""
        if self._closed:
            return
        self._closed = True
        try:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    if self._websocket.protocol == V5 and self.exit is None:
                        await self._websocket.send_bytes(CLOSE_STDIN)
                    await self._websocket.close()
        finally:
            self._abort()

    def _abort(self) -> None:
        """A peer that takes nothing more would keep the socket open for what is left to say, as long as it likes; and a
        connection that was lost stays in the session's books until the response is closed."""
        transport = self._websocket._writer.transport  # aiohttp itself closes politely only
        if transport is not None:
            transport.abort()
        self._websocket._response.close()


def parse_status(raw: bytes) -> Exit:
    """The `Status` object on channel 3. What is none of the known forms is no exit code."""
    try:
        status = json.loads(raw)
        if status.get("status") == "Success":
            return Exit(0)
        causes = (status.get("details") or {}).get("causes") or []
        codes = [cause["message"] for cause in causes if cause.get("reason") == "ExitCode"]
        return Exit(int(codes[0]) if codes else None, str(status.get("message") or ""))
    except (ValueError, AttributeError, KeyError, TypeError):
        return Exit(None, raw[:300].decode(errors="replace"))
