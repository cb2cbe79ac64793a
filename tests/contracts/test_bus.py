"""Every bus keeps the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from infra.clock import SystemClock
from infra.local.bus import LocalBus
from infra.local.database import Database
from schemas.ports import Bus, Subscription
from schemas.topics import DEAD_LETTERS
from tests.contracts.bus_contract import TOPIC, BusContract, Connect, Policy


@asynccontextmanager
async def local_connect(folder: Path) -> AsyncIterator[Connect]:
    """Two databases on one file are as far from each other as two processes."""
    async with AsyncExitStack() as stack:

        async def connect(subscriptions: Sequence[Subscription]) -> tuple[Bus, Bus]:
            one, other = [await stack.enter_async_context(Database(folder / "pigeon.db")) for _ in range(2)]
            topics = {TOPIC, DEAD_LETTERS}
            clock = SystemClock()
            return (
                LocalBus(one, topics=topics, subscriptions=subscriptions, clock=clock),
                LocalBus(other, topics=topics, subscriptions=subscriptions, clock=clock),
            )

        yield connect


def local_policy(name: str = "reader", *, topic: str = TOPIC, **fields: object) -> Subscription:
    """Deadlines short enough for tests, and long enough for a machine that stalls now and then."""
    times = {"ack_deadline": 0.6, "retry_min": 0.05, "retry_max": 0.2}
    return Subscription(**{"name": name, "topic": topic, **times, **fields})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Kind:
    """An implementation: how its subscriptions are made, and how clients connect to it."""

    policy: Policy
    connect: Callable[[Path], AbstractAsyncContextManager[Connect]]


KINDS = {"local": Kind(partial(local_policy), local_connect)}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each implementation in turn."""
    return KINDS[request.param]


@pytest.fixture
def policy(kind: Kind) -> Policy:
    """Its subscriptions."""
    return kind.policy


@pytest.fixture
async def connect(kind: Kind, tmp_path: Path) -> AsyncIterator[Connect]:
    """Its clients."""
    async with kind.connect(tmp_path) as connect:
        yield connect


class TestBus(BusContract):
    """The contract, on each of them."""
