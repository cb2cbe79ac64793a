"""What a profile makes of the bus and the store. The cloud's clients are imported only where they are used."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from infra.clock import ServiceClock
from infra.local.bus import LocalBus
from infra.local.database import Database
from infra.local.store import LocalStore
from infra.settings import Settings
from schemas.documents import INDEXES
from schemas.errors import Unavailable
from schemas.ports import Bus, Clock, Minter, Store
from schemas.topics import SUBSCRIPTIONS, TOPICS

DATABASE_FILE = "pigeon.db"
RULES = Path(__file__).with_name("firestore") / "firestore.rules"


Prune = Callable[[datetime, int], Awaitable[int]]


class ClientsMissing(Unavailable):
    """The cloud's client libraries are not installed in this environment."""

    code = "clients_missing"
    retryable = False


@dataclass(frozen=True, slots=True)
class Ports:
    """A bus, a store, and the time that all who use them share. `prune` removes expired documents where no TTL policy
    does, at most so many; `minter` is there where a browser can listen to the store itself."""

    store: Store
    bus: Bus
    clock: Clock
    prune: Prune | None = None
    minter: Minter | None = None


@asynccontextmanager
async def embedded(settings: Settings, clock: Clock) -> AsyncIterator[Ports]:
    """One SQLite file in the state folder."""
    async with Database(settings.state / DATABASE_FILE) as database:
        store = LocalStore(database, indexes=INDEXES)
        yield Ports(
            store=store,
            bus=LocalBus(database, topics=TOPICS, subscriptions=SUBSCRIPTIONS, clock=clock),
            clock=clock,
            prune=store.prune,
        )


@asynccontextmanager
async def emulators(settings: Settings, clock: Clock) -> AsyncIterator[Ports]:
    """Google's emulators: those that run already, or our own, which forget everything when they end.

    Raises EmulatorMissing, saying what to install, or ClientsMissing.
    """
    with _clients():
        from infra.adapters.firebase_token import emulator_minter
        from infra.adapters.firestore import firestore_store
        from infra.adapters.pubsub import pubsub_bus
    from infra.emulators import firestore_emulator, pubsub_emulator

    shared = ServiceClock(clock)
    async with (
        firestore_emulator(RULES) as firestore,
        pubsub_emulator() as pubsub,
        firestore_store(settings.project, indexes=INDEXES, emulator=firestore, clock=shared) as store,
        pubsub_bus(settings.project, pubsub) as bus,
    ):
        await bus.create(TOPICS, SUBSCRIPTIONS)
        yield Ports(store=store, bus=bus, clock=shared, minter=emulator_minter(shared))


@asynccontextmanager
async def gcp(settings: Settings, clock: Clock) -> AsyncIterator[Ports]:
    """Google Cloud, by the credentials of the environment; topics, subscriptions, indexes and TTL policies are deployed
    beforehand, from the same declarations.

    Raises ClientsMissing, or Unavailable where there are no credentials.
    """
    with _clients():
        from google.auth.exceptions import DefaultCredentialsError

        from infra.adapters.firebase_token import iam_minter
        from infra.adapters.firestore import firestore_store
        from infra.adapters.pubsub import pubsub_bus

    shared = ServiceClock(clock)
    async with AsyncExitStack() as opened:
        try:
            store = await opened.enter_async_context(firestore_store(settings.project, indexes=INDEXES, clock=shared))
            bus = await opened.enter_async_context(pubsub_bus(settings.project))
            account = settings.firebase_account
            minter = await asyncio.to_thread(iam_minter, shared, account=account) if account else None
        except DefaultCredentialsError as error:
            raise Unavailable(f"no credentials for Google Cloud: {error}") from error
        yield Ports(store=store, bus=bus, clock=shared, minter=minter)


@contextmanager
def _clients() -> Iterator[None]:
    """Google's clients are imported here."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")  # our children exec at once; its handlers only warn
    try:
        yield
    except ImportError as error:
        raise ClientsMissing(
            "this environment lacks Google's clients: requirements-gcp.lock has them (`make up PROFILE=emulators`)"
        ) from error


PROFILES: Mapping[str, Callable[[Settings, Clock], AbstractAsyncContextManager[Ports]]] = {
    "embedded": embedded,
    "emulators": emulators,
    "gcp": gcp,
}
