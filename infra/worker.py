"""A worker that is a process of its own, as a Deployment runs it: it answers probes, and hands its sessions on when
told to stop."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from consumers.worker import Worker
from infra.server import DRAIN_SECONDS, Server, Stops
from infra.settings import Settings
from infra.wiring import backends, workshop

logger = logging.getLogger(__name__)


class Health:
    """Answers a kubelet's probes: /healthz while the event loop turns, /readyz from the first pull to the stop."""

    def __init__(self) -> None:
        self.ready = False
        self.app = Starlette(routes=[Route("/healthz", self._alive), Route("/readyz", self._ready)])

    async def _alive(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse("alive\n")

    async def _ready(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse("ready\n") if self.ready else PlainTextResponse("not ready\n", status_code=503)


async def serve(settings: Settings, say: Callable[[str], None]) -> int:
    """Work until a signal asks to stop, then drain; returns the exit status: 1 where the work stopped by itself.

    A second signal cuts the drain short: what is held then comes again elsewhere at its deadline. Raises a
    PigeonError where a part of the deployment is missing, OSError where the port of the probes is taken.
    """
    stops, health = Stops(), Health()
    with stops.listening():
        async with AsyncExitStack() as held:
            server = Server(health.app)
            listener = held.enter_context(_listener(settings))
            probes = asyncio.create_task(server.serve(sockets=[listener]))
            held.push_async_callback(_end, server, probes)
            shop = await held.enter_async_context(workshop(await held.enter_async_context(backends(settings))))
            say(f"Isolation: {await shop.runtime.check_isolation()}.")
            say(f"Probes: http://{settings.health_host}:{listener.getsockname()[1]}/readyz")
            return await _work(Worker(shop.context), health, stops)


def _listener(settings: Settings) -> socket.socket:
    return socket.create_server((settings.health_host, settings.health_port))


async def _end(server: Server, probes: asyncio.Task[None]) -> None:
    server.should_exit = True
    await probes


async def _work(worker: Worker, health: Health, stops: Stops) -> int:
    working = asyncio.create_task(worker.run())
    asked, forced = (asyncio.create_task(event.wait()) for event in (stops.asked, stops.forced))
    health.ready = True
    try:
        await asyncio.wait((working, asked), return_when=asyncio.FIRST_COMPLETED)
        health.ready = False
        worker.stop()
        await asyncio.wait((working, forced), timeout=DRAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (working, asked, forced):
            task.cancel()
        await asyncio.gather(working, asked, forced, return_exceptions=True)
    if not working.cancelled() and working.exception() is not None:
        logger.error("the worker stopped by itself", exc_info=working.exception())
    return 0 if stops.asked.is_set() else 1
