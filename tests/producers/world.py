"""The functions on a real store and a real bus, and what a test wants to do and to know around them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeVar

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

from producers.identity import sign_local_token
from producers.routes import routes
from producers.services import Services
from schemas.documents import Chunk, Session, Stored, chunk_path, session_path
from schemas.envelope import CloudEvent, decode
from schemas.errors import BusUnavailable, StoreUnavailable
from schemas.events import Event
from schemas.functions import FUNCTIONS
from schemas.ids import SessionId, UserId, session_id
from schemas.lifecycle import LIVE, SessionState
from schemas.ports import Bus, Fields, Message, Query, Snapshot, Store, Subscription, Transaction
from tests.producers.clock import ManualClock

T = TypeVar("T")

SECRET = b"a secret of this test, 32 bytes or more"
ORIGIN = "https://terminal.example"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class BreakableBus:
    """A bus that can be taken away, and that remembers what was said."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.published: list[CloudEvent] = []
        self.messages: list[Message] = []
        self.down = False

    async def publish(self, topic: str, message: Message) -> str:
        """See Bus.publish."""
        if self.down:
            raise BusUnavailable("10.0.0.7 refuses connections")
        published = await self._bus.publish(topic, message)
        self.published.append(decode(message))
        self.messages.append(message)
        return published

    def pull(self, subscription: Subscription) -> Any:
        """See Bus.pull."""
        return self._bus.pull(subscription)


class BreakableStore:
    """A store that can be taken away, and that knows how many watch it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.down = False
        self.listening_fails = False
        self.listeners = 0
        self.queries = 0

    def _check(self, *, fails: bool = False) -> None:
        if self.down or fails:
            raise StoreUnavailable("/var/lib/pigeon.db: disk I/O error")

    async def get(self, path: str) -> Snapshot | None:
        """See Store.get."""
        self._check()
        return await self._store.get(path)

    async def create(self, path: str, data: Fields) -> str:
        """See Store.create."""
        self._check()
        return await self._store.create(path, data)

    async def update(self, path: str, fields: Fields, *, expect: str | None = None) -> str:
        """See Store.update."""
        self._check()
        return await self._store.update(path, fields, expect=expect)

    async def delete(self, path: str) -> None:
        """See Store.delete."""
        self._check()
        await self._store.delete(path)

    async def transact(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """See Store.transact."""
        self._check()
        return await self._store.transact(work)

    async def query(self, query: Query) -> list[Snapshot]:
        """See Store.query."""
        self._check()
        self.queries += 1
        return await self._store.query(query)

    def watch(self, path: str) -> AsyncIterator[Snapshot | None]:
        """See Store.watch."""
        return self._listen(self._store.watch(path))

    def follow(self, collection: str, *, after: str = "", limit: int = 32) -> AsyncIterator[list[Snapshot]]:
        """See Store.follow."""
        return self._listen(self._store.follow(collection, after=after, limit=limit))

    async def _listen(self, items: AsyncIterator[T]) -> AsyncIterator[T]:
        self.listeners += 1
        try:
            async for item in items:
                self._check(fails=self.listening_fails)
                yield item
        finally:
            self.listeners -= 1
            await items.aclose()  # type: ignore[attr-defined]


@dataclass
class World:
    """A deployment without workers: sessions are in whatever state the test puts them."""

    services: Services
    store: BreakableStore
    bus: BreakableBus
    clock: ManualClock
    _sessions: int = field(default=0)

    @property
    def events(self) -> list[Event]:
        """Everything that was said so far."""
        return [cloud_event.event for cloud_event in self.bus.published]

    @property
    def app(self) -> Starlette:
        """The functions behind a plain gateway."""
        return Starlette(
            routes=[
                Route(f"/{name}/{{id}}" if FUNCTIONS[name].by_session else f"/{name}", handler, methods=METHODS)
                for name, handler in routes(self.services).items()
            ]
        )

    def client(self, user: str = "alice", *, admin: bool = False) -> httpx.AsyncClient:
        """A caller with a valid token."""
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://functions", headers=authorization(user, admin)
        )

    async def session(self, state: SessionState = SessionState.READY, user: str = "alice", **fields: Any) -> SessionId:
        """A session as it is stored."""
        self._sessions += 1
        name = session_id(UserId(user), f"request-{self._sessions}")
        now = self.clock.now()
        session = Session(
            user_id=user,
            state=state,
            live=state in LIVE,
            created_at=fields.pop("created_at", now + timedelta(seconds=self._sessions)),
            last_activity_at=now,
            deadline=now + timedelta(minutes=1) if state in LIVE else None,
            expires_at=now + timedelta(hours=8),
            expire_at=now + timedelta(days=30),
            **fields,
        )
        await self.store.create(session_path(name), session.fields())
        return name

    async def change(self, session: str, **fields: Any) -> None:
        """Change fields of a session, given in camelCase."""
        await self.store.update(session_path(session), fields)

    async def end(self, session: str, final_offset: int | None, state: SessionState = SessionState.CLOSED) -> None:
        """The session has ended."""
        ended = {"state": state.value, "live": False, "deadline": None, "finalOffset": final_offset}
        await self.change(session, **ended)

    async def print(self, owner: str, offset: int, data: bytes) -> int:
        """Append a chunk to a transcript; returns its end."""
        await self._chunk(owner, Chunk(offset=offset, data=data, at=self.clock.now(), expire_at=self.later))
        return offset + len(data)

    async def give_up(self, owner: str, offset: int, length: int | None, reason: str) -> None:
        """Append a gap to a transcript."""
        gap = Chunk(kind="gap", offset=offset, length=length, reason=reason, at=self.clock.now(), expire_at=self.later)
        await self._chunk(owner, gap)

    async def put(self, path: str, document: Stored) -> None:
        """Store a document."""
        await self.store.create(path, document.fields())

    async def stored(self, kind: type[S], path: str) -> S:
        """Read a document that must be there."""
        snapshot = await self.store.get(path)
        assert snapshot is not None, f"there is no {path}"
        return kind.of(snapshot)

    @property
    def later(self) -> datetime:
        """When documents may be removed."""
        return self.clock.now() + timedelta(days=30)

    async def _chunk(self, owner: str, chunk: Chunk) -> None:
        await self.store.create(chunk_path(owner, chunk.offset), chunk.fields())


S = TypeVar("S", bound=Stored)


def authorization(user: str = "alice", admin: bool = False) -> dict[str, str]:
    """The headers of a caller."""
    return {"authorization": f"Bearer {sign_local_token(SECRET, user, timedelta(minutes=5), admin=admin)}"}


@asynccontextmanager
async def served(app: Starlette) -> AsyncIterator[str]:
    """The address of a real server of this application, for what an in-process transport cannot show."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, lifespan="off", log_level="critical", http="httptools")
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        await server.shutdown()
