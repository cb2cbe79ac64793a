"""The worker's side of the agent protocol (docs/agent-protocol.md), over any ByteStream."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import itertools
import json
from typing import Any

import consumers.agent.agent as wire
from schemas.errors import AgentRefused, AgentUnreachable, Superseded
from schemas.ports import ByteStream

READ_BYTES = 256 * 1024
HANDSHAKE_SECONDS = 10.0
REQUEST_SECONDS = 30.0
KEEPALIVE_SECONDS = 20.0
SILENCE_SECONDS = 60.0  # without a byte for this long a connection is dead


def session_key(secret: bytes, session: str, sandbox_uid: str) -> str:
    """The key that opens one sandbox for one session, as hex: only workers can derive it."""
    return hmac.new(secret, f"{session}:{sandbox_uid}".encode(), hashlib.sha256).hexdigest()


class AgentConnection:
    """Frames on a byte stream, after the agent's HELLO. Raises AgentUnreachable when the other side is gone."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._write_lock = asyncio.Lock()
        self.boot_id = ""
        self.challenge = ""
        self.opened = False  # when it greeted

    async def hello(self) -> None:
        """Read the agent's first frame. Raises AgentUnreachable, also for something that is no agent."""
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            kind, _, payload = await self.receive()
        if kind != wire.HELLO:
            raise AgentUnreachable(f"the agent's first frame is of type {kind}")
        greeting = json.loads(payload)
        self.boot_id, self.challenge = greeting["bootId"], greeting["challenge"]
        self.opened = greeting["opened"]

    async def receive(self, silence: float | None = None) -> tuple[int, int, bytes]:
        """The next frame as (type, argument, payload); PINGs are answered on the way. Raises TimeoutError after
        `silence` seconds without a frame of any type."""
        while True:
            async with asyncio.timeout(silence):
                kind, argument, payload = await self._frame()
            if kind == wire.PING:
                await self.send(wire.PONG, argument)
            elif kind == wire.END:
                raise _ended(payload)
            elif kind != wire.PONG:
                return kind, argument, payload

    async def _frame(self) -> tuple[int, int, bytes]:
        await self._fill(wire.HEADER.size)
        kind, length, argument = wire.HEADER.unpack_from(self._buffer)
        if length > wire.MAX_PAYLOAD:
            raise AgentUnreachable(f"the agent announced a frame of {length} bytes")
        await self._fill(wire.HEADER.size + length)
        with memoryview(self._buffer) as view:
            payload = bytes(view[wire.HEADER.size : wire.HEADER.size + length])
        del self._buffer[: wire.HEADER.size + length]
        return kind, argument, payload

    async def _fill(self, size: int) -> None:
        while len(self._buffer) < size:
            data = await self._stream.read(READ_BYTES)
            if not data:
                raise AgentUnreachable("the connection to the sandbox ended")
            self._buffer += data

    async def send(self, kind: int, argument: int = 0, payload: bytes = b"") -> None:
        """Write one frame whole, also when several tasks write."""
        async with self._write_lock:
            await self._stream.write(wire.HEADER.pack(kind, len(payload), argument) + payload)

    async def send_json(self, kind: int, argument: int, value: dict[str, Any]) -> None:
        """Write one frame with a JSON payload."""
        await self.send(kind, argument, json.dumps(value).encode())

    async def close(self) -> None:
        """End the connection; never raises."""
        await self._stream.close()


def _ended(payload: bytes) -> Exception:
    end = json.loads(payload)
    if end.get("code") == "superseded":
        return Superseded("a newer tender attached to the session")
    return AgentUnreachable(f"the agent closed the connection: {end.get('code')}: {end.get('message')}")


def _checked(payload: bytes) -> dict[str, Any]:
    reply: dict[str, Any] = json.loads(payload)
    if not reply.get("ok"):
        raise AgentRefused(str(reply.get("code", "refused")), str(reply.get("message", "")))
    return reply


async def connect(stream: ByteStream) -> AgentConnection:
    """Greet the agent at the other end of `stream`."""
    connection = AgentConnection(stream)
    try:
        await connection.hello()
    except BaseException as error:
        await connection.close()
        if isinstance(error, TimeoutError | KeyError | ValueError | TypeError):
            raise AgentUnreachable("the sandbox's agent did not greet") from error
        raise
    return connection


async def open_shell(connection: AgentConnection, key: str, **options: Any) -> None:
    """Start the shell with this key; a second call with the same key changes nothing. Raises AgentRefused."""
    await connection.send_json(wire.OPEN, 0, {"key": key, **options})
    _checked(await _reply(connection))


async def attach(connection: AgentConnection, key: str, *, epoch: int, offset: int) -> None:
    """Turn the connection into the attachment of `epoch`, from this offset and the oldest mark kept."""
    claim = {"epoch": epoch, "from": offset, "fromMark": None}
    proof = wire.attach_proof(bytes.fromhex(key), connection.challenge, epoch, offset, None)
    await connection.send_json(wire.ATTACH, 0, {"proof": proof, **claim})


async def _reply(connection: AgentConnection) -> bytes:
    async with asyncio.timeout(HANDSHAKE_SECONDS):
        while True:
            kind, _, payload = await connection.receive()
            if kind == wire.REPLY:
                return payload


class AgentControl:
    """Requests to an agent, each answered once it is durable there. Safe for concurrent use."""

    def __init__(self, connection: AgentConnection) -> None:
        self._connection = connection
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether the connection still answers."""
        return self._reader is not None and not self._reader.done()

    async def start(self, key: str) -> None:
        """Prove the key. Raises AgentRefused or AgentUnreachable."""
        await self._connection.send_json(
            wire.CONTROL, 0, {"proof": wire.control_proof(bytes.fromhex(key), self._connection.challenge)}
        )
        try:
            _checked(await _reply(self._connection))
        except TimeoutError as error:
            raise AgentUnreachable("the agent did not answer") from error
        self._reader = asyncio.create_task(self._read())
        self._keeper = asyncio.create_task(self._keep_alive())

    async def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """Ask and await the answer. Raises AgentRefused, or AgentUnreachable when it is unknown what happened."""
        if not self.alive:
            raise AgentUnreachable("the control connection is closed")
        number = next(self._ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            await self._connection.send_json(wire.REQUEST, number, {"op": op, **fields})
            async with asyncio.timeout(REQUEST_SECONDS):
                return await future
        except TimeoutError as error:
            raise AgentUnreachable(f"the agent did not answer {op} in time") from error
        finally:
            self._waiting.pop(number, None)

    async def input(self, event_id: str, data: bytes) -> None:
        """Type bytes into the terminal."""
        await self.request("input", id=event_id, data=base64.b64encode(data).decode())

    async def close(self) -> None:
        """End the connection; requests that wait raise AgentUnreachable."""
        for task in (self._reader, self._keeper):
            if task is not None:
                task.cancel()
        try:
            await asyncio.gather(*(task for task in (self._reader, self._keeper) if task), return_exceptions=True)
        finally:
            await self._connection.close()

    async def _read(self) -> None:
        reason: Exception = AgentUnreachable("the control connection ended")
        try:
            while True:
                kind, number, payload = await self._connection.receive(SILENCE_SECONDS)
                if kind == wire.REPLY:
                    self._answer(number, payload)
        except TimeoutError:
            reason = AgentUnreachable("the agent fell silent")
        except (AgentUnreachable, Superseded) as error:
            reason = error
        finally:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(reason)

    def _answer(self, number: int, payload: bytes) -> None:
        future = self._waiting.get(number)
        if future is None or future.done():
            return
        try:
            future.set_result(_checked(payload))
        except AgentRefused as error:
            future.set_exception(error)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(KEEPALIVE_SECONDS)
            try:
                await self._connection.send(wire.PING)
            except AgentUnreachable:
                return
