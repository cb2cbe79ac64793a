"""Faults between the adapter and the emulator: gRPC interceptors, and a wire that can be cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import grpc
import grpc.aio


class Faults:
    """What goes wrong at the next calls: `before` is sent, or `after` the server has done its work; at calls of the
    method `only` where that is not ""."""

    def __init__(self) -> None:
        self.before: list[grpc.StatusCode] = []
        self.after: list[grpc.StatusCode] = []
        self.only = ""
        self.calls = 0

    def interceptors(self) -> list[grpc.aio.ClientInterceptor]:
        """For every kind of call."""
        return [_Unary(self), _Streamed(self), _BothStreamed(self)]

    @property
    def after_answers(self) -> bool:
        """Whether an answer may get lost, which is known only once it has come."""
        return bool(self.after)

    def check_before(self, details: Any) -> None:
        """Raises the next fault."""
        self.calls += 1
        if self.before and self._meant(details):
            raise failure(self.before.pop(0))

    def check_after(self, details: Any) -> None:
        """Likewise."""
        if self.after and self._meant(details):
            raise failure(self.after.pop(0))

    def _meant(self, details: Any) -> bool:
        name = details.method.decode() if isinstance(details.method, bytes) else str(details.method)
        return self.only in ("", name.rpartition("/")[2])


def failure(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    """As gRPC raises it."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="injected")


class _Unary(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    async def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        """Fail before or after, or not."""
        self._faults.check_before(details)
        call = await continuation(details, request)
        if self._faults.after_answers:
            await call
        self._faults.check_after(details)
        return call


class _Streamed(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc]
    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    async def intercept_unary_stream(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        """Fail before, or not: a read that fails afterwards is no different."""
        self._faults.check_before(details)
        return await continuation(details, request)


class _BothStreamed(grpc.aio.StreamStreamClientInterceptor):  # type: ignore[misc]
    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    async def intercept_stream_stream(self, continuation: Callable[..., Any], details: Any, requests: Any) -> Any:
        """Fail before, or not."""
        self._faults.check_before(details)
        return await continuation(details, requests)


class Wire:
    """A TCP proxy on the loopback; `cut` drops what is connected, and new connections go through unless it is down."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._open: set[asyncio.StreamWriter] = set()
        self._down = False
        self.cuts = 0

    @contextmanager
    def down(self) -> Iterator[None]:
        """Nobody gets through."""
        self._down = True
        self.cut()
        try:
            yield
        finally:
            self._down = False

    def cut(self) -> None:
        """At once, with a reset."""
        self.cuts += 1
        for writer in self._open:
            writer.transport.abort()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Copy both ways until either end is gone."""
        if self._down:
            writer.transport.abort()
            return
        away_reader, away_writer = await asyncio.open_connection(self._host, self._port)
        ends = {writer, away_writer}
        self._open |= ends
        copies = [
            asyncio.ensure_future(_copy(reader, away_writer)),
            asyncio.ensure_future(_copy(away_reader, writer)),
        ]
        try:
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._open -= ends
            for copy in copies:
                copy.cancel()
            for end in ends:
                end.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def wire(target: str) -> AsyncIterator[tuple[Wire, str]]:
    """A wire to `target`, and the "host:port" of its near end."""
    line = Wire(target)
    server = await asyncio.start_server(line.connected, "127.0.0.1", 0)
    try:
        yield line, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        line.cut()
