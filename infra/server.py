"""What the processes of this system have in common: an HTTP server, and the signals that end them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

DRAIN_SECONDS = 25.0  # how long a worker may take to hand over what it holds; it takes 20 itself
CUT_SECONDS = 3  # how long connections may take to end


class Stops:
    """SIGINT, SIGTERM, SIGHUP: the first asks for an orderly stop, the second for a quick one, a third kills."""

    def __init__(self) -> None:
        self._numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which is what nohup asks for
            self._numbers.append(signal.SIGHUP)
        self.asked = asyncio.Event()
        self.forced = asyncio.Event()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to the signals in this block."""
        loop = asyncio.get_running_loop()
        for number in self._numbers:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in self._numbers:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if not self.asked.is_set():
            self.asked.set()
        elif not self.forced.is_set():
            self.forced.set()
            for number in self._numbers:
                signal.signal(number, signal.SIG_DFL)


class Server(uvicorn.Server):
    """uvicorn without signal handlers of its own, and without waiting for streams that never end."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                proxy_headers=False,
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_graceful_shutdown=CUT_SECONDS,
            )
        )
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End every connection once what was written to it is sent."""
        for connection in self.server_state.connections:
            connection.transport.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The stack listens to signals; its server does not."""
        yield
