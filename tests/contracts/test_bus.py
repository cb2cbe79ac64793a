"""Every bus keeps the contract."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.adapters.pubsub import pubsub_bus
from infra.clock import SystemClock
from infra.local.bus import LocalBus
from infra.local.database import Database
from schemas.ports import Bus, Message, Subscription
from schemas.topics import DEAD_LETTERS
from tests.contracts.bus_contract import TOPIC, BusContract, Connect, Policy, publish, read_and_ack, stays_silent, text
from tests.contracts.waiting import soon
from tests.emulators.fixtures import project, pubsub_host

__all__ = ["project", "pubsub_host"]


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


@asynccontextmanager
async def pubsub_connect(host: str, project: str) -> AsyncIterator[Connect]:
    """Two channels to the emulator."""
    async with AsyncExitStack() as stack:

        async def connect(subscriptions: Sequence[Subscription]) -> tuple[Bus, Bus]:
            one, other = [await stack.enter_async_context(pubsub_bus(project, host)) for _ in range(2)]
            await one.create({TOPIC}, subscriptions)
            return one, other

        yield connect


def pubsub_policy(name: str = "reader", *, topic: str = TOPIC, **fields: object) -> Subscription:
    """The emulator takes a second at the least."""
    times = {"ack_deadline": 1.0, "retry_min": 0.0, "retry_max": 0.1}
    return Subscription(**{"name": name, "topic": topic, **times, **fields})  # type: ignore[arg-type]


@pytest.fixture
async def connect(kind: Kind, tmp_path: Path) -> AsyncIterator[Connect]:
    """Its clients."""
    async with kind.connect(tmp_path) as connect:
        yield connect


@pytest.fixture
def policy(kind: Kind) -> Policy:
    """Its subscriptions."""
    return kind.policy


class TestLocalBus(BusContract):
    """The contract, on the embedded bus."""

    @pytest.fixture
    def kind(self) -> Kind:
        """Two databases on one file."""
        return Kind(local_policy, local_connect)


class TestPubsub(BusContract):
    """The contract, on Pub/Sub's emulator. A promise that is not kept there is overridden by a test of what happens
    instead, which fails once it is kept."""

    @pytest.fixture
    def kind(self, pubsub_host: str, project: str) -> Kind:
        """Two channels to a project of this test's own."""
        return Kind(pubsub_policy, lambda _: pubsub_connect(pubsub_host, project))

    async def test_a_busy_key_does_not_starve_a_quiet_one(self, policy: Policy, connect: Connect) -> None:
        """Not kept: the emulator hands out messages in the order of their publishing, whatever their key."""
        reader = policy(ordered=True, max_outstanding=1)
        bus, _ = await connect([reader])
        await publish(bus, *(f"busy {number}" for number in range(20)), key="busy")
        await publish(bus, "quiet", key="quiet")
        async with bus.pull(reader) as deliveries:
            assert "quiet" not in await read_and_ack(deliveries, 10)

    async def test_hopeless_messages_become_dead_letters(self, policy: Policy, connect: Connect) -> None:
        """Kept without order. With it, the emulator stops after the last attempt: the message comes no more, does not
        become a dead letter either, and blocks its key."""
        loose, strict = policy("loose", max_attempts=5), policy("strict", ordered=True, max_attempts=5)
        undertaker = policy("undertaker", topic=DEAD_LETTERS)
        bus, _ = await connect([loose, strict, undertaker])
        await bus.publish(TOPIC, Message(b"poison", {"ce-type": "x"}, "k"))
        async with bus.pull(strict) as blocked, bus.pull(loose) as deliveries, bus.pull(undertaker) as dead:
            for reader in (blocked, deliveries):
                for attempt in range(1, 6):
                    delivery = await soon(anext(reader))
                    assert (text(delivery), delivery.attempt) == ("poison", attempt)
                    await delivery.nack()
            await publish(bus, "healthy", key="k")
            assert await read_and_ack(deliveries, 1) == ["healthy"]
            silence = asyncio.ensure_future(stays_silent(deliveries, 4.0))  # the emulator moves them as it is asked
            letter = await soon(anext(dead))
            await letter.ack()
            await asyncio.gather(silence, stays_silent(blocked, 1.0), stays_silent(dead, 1.0))
        assert (text(letter), letter.message.attributes["ce-type"]) == ("poison", "x")
