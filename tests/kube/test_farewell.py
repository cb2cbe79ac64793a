"""What a worker leaves open at an API server that does not answer any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from infra.adapters.kube import KubeSandboxes, kube_sandboxes
from infra.adapters.kube_settings import KubeSettings
from tests.contracts.sandboxes_contract import spec
from tests.kube.faults import Fault
from tests.kube.server import ApiServer
from tests.waiting import until


class Relay:
    """Between a client and the server, until it freezes: what the client says then goes nowhere, its end is seen."""

    def __init__(self, server: str) -> None:
        self._host, _, self._port = server.removeprefix("https://").partition(":")
        self.frozen = False
        self.open = 0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.open += 1
        ahead, back = await asyncio.open_connection(self._host, int(self._port))
        answering = asyncio.create_task(self._copy(ahead, writer))
        try:
            await self._copy(reader, back)
        finally:
            self.open -= 1
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            for each in (writer, back):
                each.transport.abort()

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while piece := await source.read(65_536):
                if not self.frozen:
                    sink.write(piece)


@asynccontextmanager
async def relayed(api: ApiServer) -> AsyncIterator[Relay]:
    """A relay whose address the server takes for its own."""
    relay = Relay(api.url)
    carrying: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(relay.carry(reader, writer))
        carrying.add(task)
        task.add_done_callback(carrying.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    own, api.url = api.url, f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        async with server:
            yield relay
            for task in carrying:
                task.cancel()
            await asyncio.gather(*carrying, return_exceptions=True)
    finally:
        api.url = own


async def _watch(sandboxes: KubeSandboxes, api: ApiServer) -> asyncio.Task[Any]:
    made = await sandboxes.create(spec("one", "s-one"))
    waiting = asyncio.create_task(sandboxes.gone("one", made.uid))
    await _asked(api, "watch=1")
    return waiting


async def _call(sandboxes: KubeSandboxes, api: ApiServer) -> asyncio.Task[Any]:
    api.faults.add(Fault("GET", "/pods?", delay=60.0))
    listing = asyncio.create_task(sandboxes.list())
    await _asked(api, "/pods?")
    return listing


async def _exec(sandboxes: KubeSandboxes, api: ApiServer) -> asyncio.Task[Any]:
    made = await sandboxes.create(spec("one", "s-one"))
    await sandboxes.running("one", made.uid)
    api.faults.add(Fault("GET", "/exec", delay=60.0))
    connecting = asyncio.create_task(sandboxes.connect("one", made.uid))
    await _asked(api, "/exec")
    return connecting


async def _asked(api: ApiServer, words: str) -> None:
    async def asked() -> bool:
        return any(words in path for _, path in api.requests)

    await until(asked, f"the server is asked for {words}")


UnderWay = Callable[[KubeSandboxes, ApiServer], Awaitable[asyncio.Task[Any]]]


@pytest.mark.parametrize("under_way", [_watch, _call, _exec])
async def test_no_connection_outlives_its_worker(api: ApiServer, tmp_path: Path, under_way: UnderWay) -> None:
    """TLS would wait half a minute for the server's own farewell, with nobody left who waits for anything."""
    async with relayed(api) as relay:
        settings = KubeSettings(access="kubeconfig", kubeconfig=api.kubeconfig(tmp_path / "config"))
        async with kube_sandboxes(settings) as sandboxes:
            task = await under_way(sandboxes, api)
            assert relay.open
            relay.frozen = True
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        async def all_closed() -> bool:
            return relay.open == 0

        await until(all_closed, "every connection is closed", patience=5.0)
