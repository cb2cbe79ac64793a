"""A whole deployment on the emulators in this process, whose calls are counted."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import grpc.aio
import httpx
from starlette.applications import Starlette
from starlette.routing import Route

from bench.emulators import beside
from bench.tally import Tally
from consumers.context import Context
from consumers.controls import Controls
from consumers.worker import Worker
from infra.adapters.firestore import FirestoreStore, firestore_store
from infra.adapters.pubsub import PubsubBus, pubsub_bus
from infra.client import Client, FixedToken
from infra.clock import SystemClock
from infra.local.sandboxes import LocalSandboxes
from infra.server import Server
from producers.identity import LocalIdentity, sign_local_token
from producers.routes import routes
from producers.services import Services
from schemas.documents import INDEXES, Command, command_path
from schemas.http import StreamedData
from schemas.limits import MIB, Limits
from schemas.ports import Bus, Store
from schemas.topics import SUBSCRIPTIONS, TOPICS

SECRET = bytes(range(32))
PROMPT = b"$ "
PATIENCE = 60.0  # seconds
UNSIGNED = timedelta(hours=1)  # a tender's signature is a cost of time, not of commands: keep it out of the counts
LIMITS = Limits().model_copy(update={"pool_size": 0, "tended_every": UNSIGNED, "output_bytes": 1024 * MIB})


@dataclass
class Reader:
    """One reader's stream of server-sent events."""

    data: bytearray = field(default_factory=bytearray)
    news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def read(self, client: Client, session: str) -> None:
        """Take in the stream until it ends."""
        async for item in client.stream(session):
            if isinstance(item, StreamedData):
                async with self.news:
                    self.data += item.data
                    self.news.notify_all()

    async def prompt(self, start: int = 0) -> None:
        """Return when the terminal prompts after offset `start`."""
        async with asyncio.timeout(PATIENCE), self.news:
            await self.news.wait_for(lambda: len(self.data) > start and self.data.endswith(PROMPT))


@dataclass
class Deployment:
    """Gateway and worker; `tally` counts what they ask, and `unseen` is a store that looks on without being counted."""

    tally: Tally
    client: Client
    unseen: FirestoreStore

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """A session at its prompt, with one reader."""
        name = (await self.client.create()).session_id
        reader = Reader()
        async with beside(reader.read(self.client, name)):
            await reader.prompt()
            yield Session(self, name, reader)
            await self.client.close(name)


@dataclass
class Session:
    """One live session and its reader."""

    deployment: Deployment
    id: str
    reader: Reader

    async def run(self, text: str) -> Command:
        """Submit a command; returns its record once its end is written and the next prompt has reached the reader."""
        start = len(self.reader.data)
        answer = await self.deployment.client.execute(self.id, text)
        record = await self._ended(answer.command_id)
        assert record.end_offset is not None
        await self.reader.prompt(max(start, record.end_offset))
        return record

    async def _ended(self, command: str) -> Command:
        async with asyncio.timeout(PATIENCE):
            async for snapshot in self.deployment.unseen.watch(command_path(self.id, command)):
                if snapshot is not None and (record := Command.of(snapshot)).ended_at is not None:
                    return record
        raise AssertionError("a watch never ends")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a deployment is: its sandboxes' folder and Python, the emulators, and its project."""

    folder: Path
    python: Path
    pubsub: str
    firestore: str
    project: str

    def store(self, *interceptors: grpc.aio.ClientInterceptor) -> AbstractAsyncContextManager[FirestoreStore]:
        """A client of its documents."""
        return firestore_store(self.project, indexes=INDEXES, emulator=self.firestore, interceptors=interceptors)

    def bus(self, *interceptors: grpc.aio.ClientInterceptor) -> AbstractAsyncContextManager[PubsubBus]:
        """A client of its messages."""
        return pubsub_bus(self.project, self.pubsub, interceptors=interceptors)


@asynccontextmanager
async def deployment(place: Place) -> AsyncIterator[Deployment]:
    """Gateway and worker in this process, in a project of their own."""
    tally = Tally()
    counted = tally.interceptors()
    async with place.store() as unseen, place.store(*counted) as store, place.bus(*counted) as bus:
        await bus.create(TOPICS, SUBSCRIPTIONS)
        async with working(place, store, bus), gateway(store, bus) as client:
            yield Deployment(tally, client, unseen)


@asynccontextmanager
async def working(place: Place, store: Store, bus: Bus) -> AsyncIterator[Worker]:
    """A worker; on leaving it all sandboxes are removed."""
    sandboxes = LocalSandboxes(place.folder / "sandboxes", limits=LIMITS, python=place.python)
    controls = Controls(sandboxes, SECRET)
    worker = Worker(
        Context(store=store, bus=bus, sandboxes=sandboxes, clock=SystemClock(), limits=LIMITS, controls=controls)
    )
    try:
        async with beside(worker.run()) as running:
            yield worker
            worker.stop()
            await asyncio.wait([running], timeout=PATIENCE)
    finally:
        for sandbox in await sandboxes.list():
            await sandboxes.delete(sandbox.name, sandbox.uid)


@asynccontextmanager
async def gateway(store: Store, bus: Bus) -> AsyncIterator[Client]:
    """The functions behind a socket, and a client of them."""
    services = Services(
        store=store,
        bus=bus,
        identity=LocalIdentity(SECRET),
        clock=SystemClock(),
        limits=LIMITS,
        minter=None,
        allowed_origins=frozenset(),
        source="/producers",
    )
    found = [
        Route(f"/{name}{rest}", work, methods=["GET", "POST", "DELETE"])
        for name, work in routes(services).items()
        for rest in ("", "/{id}")
    ]
    server = Server(Starlette(routes=found))
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    token = sign_local_token(SECRET, "alice", timedelta(hours=1))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with (
        beside(server.serve(sockets=[listener])) as serving,
        httpx.AsyncClient(base_url=url, auth=FixedToken(token), timeout=PATIENCE, trust_env=False) as http,
    ):
        await server.ready.wait()
        yield Client(http)
        server.should_exit = True
        await asyncio.wait([serving], timeout=PATIENCE)
