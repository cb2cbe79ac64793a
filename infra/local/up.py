"""The embedded stack in one process: gateway, worker, ticker and sandboxes on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from consumers.worker import Worker
from infra.local.gateway import Access, gateway
from infra.local.guard import Guard
from infra.local.keys import token_secret
from infra.local.presence import Claim, claim
from infra.local.shutdown import close_sessions, delete_sandboxes
from infra.local.ticker import tick
from infra.server import DRAIN_SECONDS, Server, Stops
from infra.settings import Settings
from infra.wiring import Backends, Workshop, backends, services, workshop
from producers.routes import routes
from schemas.errors import PigeonError

ROLES = ("gateway", "worker", "ticker")

logger = logging.getLogger(__name__)
Say = Callable[[str], None]


class PortInUse(PigeonError):
    """Another program listens on the port."""

    code = "port_in_use"


def up(settings: Settings, roles: frozenset[str], user: str, say: Say) -> int:
    """Run these roles until a signal asks to stop; returns the exit status: 0, or 1 if a part of the stack failed.

    The page that it prints the address of is that `user`'s; `say` gets lines for people. Raises AlreadyRunning,
    PortInUse, InsecureSecret or another PigeonError at start.
    """
    with contextlib.ExitStack() as held:
        if "gateway" not in roles:
            return asyncio.run(_Stack(settings, roles, say).run())
        own = held.enter_context(claim(settings.state))
        listener = held.enter_context(listen(settings.port))
        return asyncio.run(_Stack(settings, roles, say, _Door(own, listener, user)).run())


def listen(port: int) -> socket.socket:
    """A socket that listens on this port of 127.0.0.1 (0: any that is free). Raises PortInUse.

    It names its protocol: only then does asyncio send at once (TCP_NODELAY). Otherwise the body of every answer waits
    up to 40 ms for the client to acknowledge its head.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(512)
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            reason = "is in use" if error.errno == errno.EADDRINUSE else "is not for plain users"
            raise PortInUse(f"port {port} of 127.0.0.1 {reason}: choose another with --port or PORT=") from error
        raise
    return listener


@dataclass(frozen=True, slots=True)
class _Door:
    """What a gateway holds before it starts: its claim on the state folder, its port, and whose page it opens."""

    claim: Claim
    listener: socket.socket
    user: str


class _Stack:
    """The parts of one process, started together and stopped in order."""

    def __init__(self, settings: Settings, roles: frozenset[str], say: Say, door: _Door | None = None) -> None:
        self._settings = settings
        self._roles = roles
        self._say = say
        self._door = door
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failed = False

    async def run(self) -> int:
        stops = Stops()
        with stops.listening():
            async with backends(self._settings) as opened, AsyncExitStack() as equipped:
                works = "worker" in self._roles
                shop = await equipped.enter_async_context(workshop(opened)) if works else None
                await self._serve(opened, shop, stops)
                if shop is not None and self._ends_sessions():
                    await delete_sandboxes(shop.runtime)
        return 1 if self._failed else 0

    def _ends_sessions(self) -> bool:
        """Whether nothing may outlive this process: it is the whole stack, and was asked to stop. After a failure
        the sandboxes stay, and the next start goes on with their sessions."""
        return self._roles == frozenset(ROLES) and not self._failed

    async def _serve(self, opened: Backends, shop: Workshop | None, stops: Stops) -> None:
        isolation = "" if shop is None else await shop.runtime.check_isolation()
        consumer = None if shop is None else Worker(shop.context)
        guard, server = await self._start_gateway(opened)
        if consumer is not None:
            self._say(f"Isolation: {isolation}.")
            self._start("worker", consumer.run())
        if "ticker" in self._roles:
            self._start("ticker", tick(opened.ports, self._settings.tick_seconds))
        asked = asyncio.create_task(stops.asked.wait())
        await asyncio.wait({asked, *self._tasks.values()}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        self._note_failures()
        await self._close(opened, guard, stops)
        if server is not None:
            server.should_exit = True
        if consumer is not None:
            consumer.stop()
        await self._finish(stops)

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._tasks[name] = asyncio.create_task(work, name=name)

    async def _start_gateway(self, opened: Backends) -> tuple[Guard | None, Server | None]:
        if self._door is None:
            return None, None
        port = self._door.listener.getsockname()[1]
        access = Access(token_secret(self._settings.state), opened.ports.clock, port=port)
        guard = gateway(routes(services(opened)), access, allowed_origins=self._settings.allowed_origins)
        server = Server(guard)
        self._start("gateway", server.serve(sockets=[self._door.listener]))
        await server.ready.wait()
        self._door.claim.announce(port)
        self._greet(access.address(self._door.user))
        return guard, server

    def _greet(self, address: str) -> None:
        if self._settings.unsafe_no_sandbox:
            self._say("WARNING: PIGEON_UNSAFE_NO_SANDBOX is set: what runs in a session can do whatever you can do.")
        if self._settings.network == "host":
            self._say("WARNING: PIGEON_NETWORK=host: what runs in a session can reach this machine's network.")
        self._say("pigeon is up. This address opens its page, once and within ten minutes:")
        self._say(f"\n    {address}\n")
        self._say("`pigeon open` prints a fresh one; Ctrl-C stops everything.")

    def _note_failures(self) -> None:
        for name, task in self._tasks.items():
            if task.done():
                self._failed = True
                logger.error("the %s stopped by itself", name, exc_info=task.exception())

    async def _close(self, opened: Backends, guard: Guard | None, stops: Stops) -> None:
        if guard is not None:
            guard.closing = True
        if not self._ends_sessions():
            return
        closing = asyncio.create_task(close_sessions(opened, self._say))
        await self._unless_forced(stops, {closing})
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)

    async def _finish(self, stops: Stops) -> None:
        if "ticker" in self._tasks:
            self._tasks["ticker"].cancel()
        await self._unless_forced(stops, set(self._tasks.values()), DRAIN_SECONDS)
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    @staticmethod
    async def _unless_forced(stops: Stops, tasks: set[asyncio.Task[None]], timeout: float | None = None) -> None:
        """Wait for all of them, for the second signal, or for the time-out (seconds)."""
        forced = asyncio.create_task(stops.forced.wait())
        all_done = asyncio.create_task(_settled(tasks))
        await asyncio.wait({forced, all_done}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        forced.cancel()
        all_done.cancel()


async def _settled(tasks: set[asyncio.Task[None]]) -> bool:
    """Return when all of them are done, however."""
    if tasks:
        await asyncio.wait(tasks)
    return True
