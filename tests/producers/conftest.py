"""A fresh world for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from infra.clock import SystemClock
from infra.local.bus import LocalBus
from infra.local.database import Database
from infra.local.store import LocalStore
from producers.identity import LocalIdentity
from producers.services import Services
from schemas.documents import INDEXES
from schemas.limits import Limits
from schemas.topics import SUBSCRIPTIONS, TOPICS
from tests.producers.clock import ManualClock
from tests.producers.world import ORIGIN, SECRET, BreakableBus, BreakableStore, World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """The functions on an empty store and an empty bus."""
    async with Database(tmp_path / "pigeon.db") as database:
        store = BreakableStore(LocalStore(database, indexes=INDEXES))
        bus = BreakableBus(
            LocalBus(database, topics=TOPICS, subscriptions=SUBSCRIPTIONS, clock=SystemClock()),
        )
        clock = ManualClock()
        services = Services(
            store=store,
            bus=bus,
            identity=LocalIdentity(SECRET),
            clock=clock,
            limits=Limits(sessions_per_user=3),
            minter=None,
            allowed_origins=frozenset({ORIGIN}),
            source="/producers",
        )
        yield World(services, store, bus, clock)


@pytest.fixture
async def alice(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """A caller."""
    async with world.client("alice") as client:
        yield client


@pytest.fixture
async def bob(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """Another caller."""
    async with world.client("bob") as client:
        yield client


@pytest.fixture
async def anyone(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """Somebody without a token."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(world.app), base_url="http://functions") as client:
        yield client
