"""Workers in this process on the real store, bus and sandboxes, with a clock that can be set forward."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from consumers.context import Context
from consumers.controls import Controls
from consumers.settlement import Settlement
from consumers.worker import Worker, dispatch
from infra.local.bus import LocalBus
from infra.local.database import Database
from infra.local.sandboxes import LocalSandboxes
from infra.local.store import LocalStore
from schemas.documents import (
    INDEXES,
    Chunk,
    Command,
    Session,
    User,
    chunks_of,
    command_path,
    session_path,
    user_path,
)
from schemas.envelope import wrap
from schemas.events import ClockTicked, CommandSubmitted, Event, SessionRequested
from schemas.ids import SessionId, UserId, new_id, session_id
from schemas.lifecycle import ENDED, SessionState
from schemas.limits import Limits
from schemas.ports import Query
from schemas.topics import SUBSCRIPTIONS, TOPICS
from tests.waiting import until


class SettableClock:
    """The machine's clock, set forward when a test says so."""

    def __init__(self) -> None:
        self._ahead = timedelta(0)

    def now(self) -> datetime:
        return datetime.now(UTC) + self._ahead

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def forward(self, by: timedelta) -> None:
        self._ahead += by


@dataclass
class House:
    """One deployment: a context whose handlers can be called, and workers that can be hired."""

    context: Context
    clock: SettableClock
    hired: AsyncExitStack

    def fellow(self) -> Context:
        """The context of another worker process: the same backends, connections of its own."""
        own = self.context
        return Context(
            store=own.store,
            bus=own.bus,
            sandboxes=own.sandboxes,
            clock=own.clock,
            limits=own.limits,
            controls=Controls(own.sandboxes, SECRET),
        )

    async def hire(self) -> Worker:
        """Start one more worker."""
        return await self.hired.enter_async_context(working(self.fellow()))

    async def publish(self, event: Event, session: str, *, id: str | None = None) -> None:
        await self.context.publish(event, session, id=id)

    async def handle(self, event: Event, session: str, *, id: str | None = None) -> Settlement:
        """Call the handler of one delivery."""
        return await dispatch(self.context, wrap(event, subject=session, source="/test", time=self.clock.now(), id=id))

    async def tick(self) -> None:
        """One sweep."""
        await self.handle(ClockTicked(at=self.clock.now()), "")

    async def record(self, user: str = "alice", **fields: Any) -> SessionId:
        """What the function writes before it publishes: the session and its user's count."""
        name = session_id(UserId(user), new_id())
        now, limits = self.clock.now(), self.context.limits
        session = Session(
            user_id=user,
            state=SessionState.REQUESTED,
            live=True,
            created_at=now,
            last_activity_at=now,
            deadline=now + limits.request_timeout,
            expires_at=now + limits.session_lifetime,
            expire_at=now + limits.session_lifetime + limits.retention,
        )
        store = self.context.store
        await store.create(session_path(name), replace_fields(session, fields).fields())
        known = await store.get(user_path(user))
        if known is None:
            await store.create(user_path(user), User(live_sessions=1).fields())
        else:
            await store.update(user_path(user), {"liveSessions": User.of(known).live_sessions + 1})
        return name

    async def request(self, user: str = "alice") -> SessionId:
        """Ask for a session as the function does."""
        name = await self.record(user)
        await self.publish(SessionRequested(user_id=user), name)
        return name

    async def ready(self, user: str = "alice") -> SessionId:
        """A session whose shell runs; needs a hired worker."""
        name = await self.request(user)
        await self.until_state(name, SessionState.READY)
        return name

    async def submit(self, session: str, text: str, command: str | None = None) -> str:
        """Publish a command; returns its id."""
        command = command or new_id()
        await self.publish(CommandSubmitted(command_id=command, text=text), session, id=f"{session}-{command}")
        return command

    async def run(self, session: str, text: str) -> tuple[Command, bytes]:
        """Submit a command and await its end; returns its record and what it printed."""
        command = await self.submit(session, text)
        record = await self.ended(session, command)
        start, end = record.start_offset, record.end_offset
        return record, (await self.transcript(session))[start:end] if start is not None else b""

    async def ended(self, session: str, command: str) -> Command:
        async def look() -> Command | None:
            record = await self.command(session, command)
            return record if record is not None and record.ended_at is not None else None

        return await until(look, f"command {command} has an end")

    async def session(self, name: str) -> Session:
        snapshot = await self.context.store.get(session_path(name))
        assert snapshot is not None
        return Session.of(snapshot)

    async def command(self, session: str, command: str) -> Command | None:
        snapshot = await self.context.store.get(command_path(session, command))
        return None if snapshot is None else Command.of(snapshot)

    async def live_sessions(self, user: str = "alice") -> int:
        snapshot = await self.context.store.get(user_path(user))
        return User.of(snapshot).live_sessions if snapshot else 0

    async def until_state(self, name: str, *states: SessionState) -> Session:
        async def look() -> Session | None:
            session = await self.session(name)
            assert session.state in states or session.state not in ENDED, f"{session.state}: {session.reason}"
            return session if session.state in states else None

        try:
            return await until(look, f"session {name} is {' or '.join(states)}")
        except AssertionError as failure:
            found = await self.session(name)
            raise AssertionError(f"{failure}; {found!r}; {await self.context.sandboxes.list()!r}") from failure

    async def chunks(self, session: str) -> list[Chunk]:
        """Every chunk; fails where they do not join."""
        found: list[Chunk] = []
        while True:
            after = found[-1].offset if found else None
            query = Query(chunks_of(session_path(session)), after="" if after is None else f"{after:016d}", limit=100)
            page = [Chunk.of(snapshot) for snapshot in await self.context.store.query(query)]
            for chunk in page:
                assert chunk.offset == (found[-1].end if found else 0), "a gap or a double in the transcript"
                found.append(chunk)
            if not page:
                return found

    async def transcript(self, session: str) -> bytes:
        return b"".join(chunk.data for chunk in await self.chunks(session))


SECRET = b"a secret of the tests' own workers"


def replace_fields(session: Session, fields: dict[str, Any]) -> Session:
    """The session with these fields instead."""
    return session.model_copy(update=fields)


@asynccontextmanager
async def house(state: Path, python: Path, **limits: Any) -> AsyncIterator[House]:
    """Open one on a state folder; on leaving it its workers go and its sandboxes are removed."""
    clock, kept = SettableClock(), Limits().model_copy(update={"pool_size": 0, **limits})
    sandboxes = LocalSandboxes(state / "sandboxes", limits=kept, python=python)
    async with Database(state / "pigeon.db") as database, AsyncExitStack() as hired:
        context = Context(
            store=LocalStore(database, indexes=INDEXES),
            bus=LocalBus(database, topics=TOPICS, subscriptions=SUBSCRIPTIONS, clock=clock),
            sandboxes=sandboxes,
            clock=clock,
            limits=kept,
            controls=Controls(sandboxes, SECRET),
        )
        try:
            yield House(context, clock, hired)
        finally:
            await hired.aclose()
            await context.controls.close()
            for sandbox in await sandboxes.list():
                await sandboxes.delete(sandbox.name, sandbox.uid)


@asynccontextmanager
async def working(context: Context) -> AsyncIterator[Worker]:
    """A worker that runs until the context is left; then it is cut off, as a crash would."""
    worker = Worker(context)
    running = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
