"""Passing faults at every remote call that the adapters make, and at no other: nobody notices."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

import infra.adapters
from infra.adapters.firestore import FirestoreStore, firestore_store
from infra.adapters.pubsub import PubsubBus, pubsub_bus
from schemas.documents import INDEXES
from schemas.ports import Message, Query, Subscription
from tests.contracts.waiting import listening, soon
from tests.emulators.faults import Faults

Code = grpc.StatusCode
PASSING = [Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.ABORTED]
TOPIC = "happenings"
READER = Subscription("reader", TOPIC, ack_deadline=3.0, max_attempts=100)
CALLS = (
    re.compile(r"\.(?:publisher|subscriber)\.(\w+)\("),  # of the generated clients
    re.compile(r'SERVICE \+ "(\w+)"'),  # of plain gRPC
)


@pytest.fixture
def faults() -> Faults:
    """None yet."""
    return Faults()


@pytest.fixture
async def bus(pubsub_host: str, project: str, faults: Faults) -> AsyncIterator[PubsubBus]:
    """Its calls can fail; there is a message to read."""
    async with pubsub_bus(project, pubsub_host, interceptors=faults.interceptors()) as opened:
        await opened.create({TOPIC}, [READER])
        await opened.publish(TOPIC, Message(b"1"))
        yield opened


@pytest.fixture
async def store(firestore_host: str, project: str, faults: Faults) -> AsyncIterator[FirestoreStore]:
    """Its calls can fail; there is a document to read."""
    opening = firestore_store(project, indexes=INDEXES, emulator=firestore_host, interceptors=faults.interceptors())
    async with opening as opened:
        await opened.create("users/u1", {"count": 1})
        yield opened


async def makes_topics(bus: PubsubBus) -> None:
    """One more, with a subscription."""
    await bus.create({"others"}, [Subscription("other-reader", "others")])


async def publishes(bus: PubsubBus) -> None:
    """In order and without."""
    await bus.publish(TOPIC, Message(b"2"))
    await bus.publish(TOPIC, Message(b"3", ordering_key="k"))


async def reads(bus: PubsubBus) -> None:
    """One message, which does not come again once it is acked."""
    async with bus.pull(READER) as deliveries:
        delivery = await soon(anext(deliveries))
        await delivery.ack()
        with pytest.raises(TimeoutError):
            await soon(anext(deliveries), READER.ack_deadline * 1.2)


async def holds(bus: PubsubBus) -> None:
    """One message, for longer than its deadline."""
    async with bus.pull(READER) as deliveries:
        delivery = await soon(anext(deliveries))
        with pytest.raises(TimeoutError):
            await soon(delivery.lost(), READER.ack_deadline * 1.5)
        assert delivery.attempt == 1
        await delivery.ack()
    async with bus.pull(READER) as deliveries:
        with pytest.raises(TimeoutError):
            await soon(anext(deliveries), 1.0)


ON_PUBSUB: dict[str, Callable[[PubsubBus], Awaitable[None]]] = {
    "CreateTopic": makes_topics,
    "CreateSubscription": makes_topics,
    "Publish": publishes,
    "Pull": reads,
    "Acknowledge": reads,
    "ModifyAckDeadline": holds,
}


async def gets(store: FirestoreStore) -> None:
    """One document."""
    assert (await store.get("users/u1")) is not None


async def asks(store: FirestoreStore) -> None:
    """A query and a page of history."""
    assert len(await store.query(Query("users"))) == 1
    async with listening(store.follow("users")) as batches:
        assert len(await soon(anext(batches))) == 1


async def creates(store: FirestoreStore) -> None:
    """One document, once."""
    await store.create("sessions/s1", {"by": "me"})


async def watches(store: FirestoreStore) -> None:
    """One document, as it is and as it becomes."""
    async with listening(store.watch("users/u1")) as states:
        first = await soon(anext(states))
        await store.update("users/u1", {"count": 2})
        second = await soon(anext(states))
    assert first is not None
    assert second is not None
    assert (first.data["count"], second.data["count"]) == (1, 2)


ON_FIRESTORE: dict[str, Callable[[FirestoreStore], Awaitable[None]]] = {
    "BatchGetDocuments": gets,
    "RunQuery": asks,
    "Commit": creates,
    "Listen": watches,
}


def some(*methods: str) -> list[Any]:
    """Parameters; those that wait for a deadline are slow."""
    waiting = ("Acknowledge", "ModifyAckDeadline", "Pull")
    return [pytest.param(method, marks=[pytest.mark.slow] if method in waiting else []) for method in methods]


@pytest.mark.parametrize("code", PASSING, ids=lambda code: code.name)
@pytest.mark.parametrize("method", some(*ON_PUBSUB))
async def test_a_passing_fault_of_pubsub_is_not_seen(
    bus: PubsubBus, faults: Faults, method: str, code: grpc.StatusCode
) -> None:
    """Twice in a row at that call, before the service has heard of it."""
    faults.only, faults.before = method, [code, code]
    await ON_PUBSUB[method](bus)
    assert not faults.before


@pytest.mark.parametrize("method", some(*(method for method in ON_PUBSUB if method != "Pull")))
async def test_a_lost_answer_of_pubsub_is_not_seen(bus: PubsubBus, faults: Faults, method: str) -> None:
    """Done twice is as good as done: but for a message that is there twice, which is what handlers are made for."""
    faults.only, faults.after = method, [Code.UNAVAILABLE]
    await ON_PUBSUB[method](bus)
    assert not faults.after


@pytest.mark.parametrize("code", PASSING, ids=lambda code: code.name)
@pytest.mark.parametrize("method", ON_FIRESTORE)
async def test_a_passing_fault_of_firestore_is_not_seen(
    store: FirestoreStore, faults: Faults, method: str, code: grpc.StatusCode
) -> None:
    """Likewise."""
    faults.only, faults.before = method, [code, code]
    await ON_FIRESTORE[method](store)
    assert not faults.before


@pytest.mark.parametrize(
    ("modules", "table"), [("pubsub*.py", ON_PUBSUB), ("firestore*.py", ON_FIRESTORE)], ids=["pubsub", "firestore"]
)
def test_no_call_is_left_out(modules: str, table: dict[str, object]) -> None:
    """Whoever adds a remote call to an adapter says here what becomes of it on a bad day."""
    folder = Path(infra.adapters.__file__).parent
    found = {
        "".join(part.capitalize() for part in name.split("_")) if name.islower() else name
        for module in folder.glob(modules)
        for pattern in CALLS
        for name in pattern.findall(module.read_text())
    }
    assert found == set(table)
