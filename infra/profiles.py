"""What a profile makes of the bus and the store. The cloud's clients are imported only where they are used."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

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
    """A bus and a store. `prune` removes expired documents where no TTL policy does, at most so many; `minter` is there
    where a browser can listen to the store itself."""

    store: Store
    bus: Bus
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
            prune=store.prune,
        )


@asynccontextmanager
async def emulators(settings: Settings, clock: Clock) -> AsyncIterator[Ports]:
    """Google's emulators: those that run already, or our own, which forget everything when they end.

    Raises EmulatorMissing, saying what to install, or ClientsMissing.
    """
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")  # our children exec at once; its handlers only warn
    try:
        from infra.adapters.firebase_token import emulator_minter
        from infra.adapters.firestore import firestore_store
        from infra.adapters.pubsub import pubsub_bus
    except ImportError as error:
        raise ClientsMissing(
            "this environment lacks Google's clients: `make up PROFILE=emulators` installs them"
        ) from error
    from infra.emulators import firestore_emulator, pubsub_emulator

    async with (
        firestore_emulator(RULES) as firestore,
        pubsub_emulator() as pubsub,
        firestore_store(settings.project, indexes=INDEXES, emulator=firestore) as store,
        pubsub_bus(settings.project, pubsub) as bus,
    ):
        await bus.create(TOPICS, SUBSCRIPTIONS)
        yield Ports(store=store, bus=bus, minter=emulator_minter(clock))


PROFILES: Mapping[str, Callable[[Settings, Clock], AbstractAsyncContextManager[Ports]]] = {
    "embedded": embedded,
    "emulators": emulators,
}
