"""From publishing a message to its handler, on the Pub/Sub emulator."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import grpc
from google.cloud.pubsub_v1 import PublisherClient, SubscriberClient  # type: ignore[import-untyped]
from google.cloud.pubsub_v1.types import BatchSettings, PublisherOptions  # type: ignore[import-untyped]
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

from bench.bare import BareBus, bare_bus
from bench.emulators import Emulators, beside
from bench.report import OURS, RAW, Figure, latencies
from infra.adapters.pubsub import PubsubBus, pubsub_bus
from schemas.ports import Delivery, Message, Subscription

LIBRARY = "google-cloud-pubsub"
GAP_SECONDS = 0.03  # between two messages, on average: arrivals of their own time, which lock to no tick
KEYS = 10
WARM_UP = 20  # messages before the first one that counts
BODY = b"x" * 300  # a command's event has about as many bytes
SUBSCRIPTION = Subscription(name="ours", topic="ours", ordered=True)

Publish = Callable[[bytes, str], Awaitable[object]]


class Side:
    """One way of publishing, and when what was published was accepted and arrived."""

    def __init__(self, publish: Publish) -> None:
        self._publish = publish
        self._sent: dict[int, float] = {}
        self.published: list[float] = []
        self.handled: list[float] = []

    async def send(self, number: int) -> None:
        """Publish message `number`; its arrival is measured from here."""
        self._sent[number] = time.perf_counter()
        await self._publish(b"%d " % number + BODY, f"key{number % KEYS}")
        self.published.append(time.perf_counter() - self._sent[number])

    def arrived(self, data: bytes) -> None:
        """A handler has this message."""
        self.handled.append(time.perf_counter() - self._sent[int(data.partition(b" ")[0])])


def measure(emulators: Emulators, *, count: int) -> Iterator[Figure]:
    """Messages of ten sessions, at random moments and by each way in turns; each way has its topic."""
    sides = emulators.run(_measure(emulators, count))
    yield from latencies("publish to handler", {name: side.handled for name, side in sides.items()})
    yield from latencies("publish", {name: side.published for name, side in sides.items()})


async def _measure(emulators: Emulators, count: int) -> dict[str, Side]:
    project = emulators.project()
    async with AsyncExitStack() as held:
        ours = await held.enter_async_context(pubsub_bus(project, emulators.pubsub))
        await ours.create([SUBSCRIPTION.topic], [SUBSCRIPTION])
        bare = await held.enter_async_context(bare_bus(emulators.pubsub, project))

        async def publish(data: bytes, key: str) -> None:
            await ours.publish(SUBSCRIPTION.topic, Message(data, {}, key))

        sides = {OURS: Side(publish), RAW: Side(bare.publish)}
        await held.enter_async_context(beside(_pull(ours, sides[OURS])))
        await held.enter_async_context(beside(_pull_bare(bare, sides[RAW])))
        sides[LIBRARY] = held.enter_context(_library(emulators.pubsub, project))
        await _drive(list(sides.values()), WARM_UP)
        for side in sides.values():
            side.published.clear()
            side.handled.clear()
        await _drive(list(sides.values()), count)
    return sides


async def _drive(sides: list[Side], count: int) -> None:
    chance = random.Random(3)
    async with asyncio.TaskGroup() as sending:
        for number in range(count):
            for side in sides:
                await asyncio.sleep(chance.expovariate(1 / GAP_SECONDS))
                sending.create_task(side.send(number))
    async with asyncio.timeout(60):
        while any(len(side.handled) < count for side in sides):  # noqa: ASYNC110 - one of them counts in a thread
            await asyncio.sleep(0.05)


async def _pull(bus: PubsubBus, side: Side) -> None:
    async with bus.pull(SUBSCRIPTION) as deliveries, asyncio.TaskGroup() as settling:
        async for delivery in deliveries:
            settling.create_task(_settle(delivery, side))


async def _settle(delivery: Delivery, side: Side) -> None:
    side.arrived(delivery.message.data)
    await delivery.ack()


async def _pull_bare(bus: BareBus, side: Side) -> None:
    async with asyncio.TaskGroup() as settling:
        while True:
            received = await bus.pull()
            for each in received:
                side.arrived(each.message.data)
            if received:
                settling.create_task(bus.acknowledge(received))


@contextmanager
def _library(host: str, project: str) -> Iterator[Side]:
    """The high-level client as it is quickest: no batching delay, streaming pull."""
    publisher = PublisherClient(
        batch_settings=BatchSettings(max_latency=0),
        publisher_options=PublisherOptions(enable_message_ordering=True),
        transport=PublisherGrpcTransport(channel=grpc.insecure_channel(host)),
    )
    subscriber = SubscriberClient(transport=SubscriberGrpcTransport(channel=grpc.insecure_channel(host)))
    topic, subscription = f"projects/{project}/topics/library", f"projects/{project}/subscriptions/library"
    publisher.create_topic(name=topic)
    subscriber.create_subscription({"name": subscription, "topic": topic, "enable_message_ordering": True})

    async def publish(data: bytes, key: str) -> None:
        await asyncio.wrap_future(publisher.publish(topic, data, ordering_key=key))

    side = Side(publish)

    def handle(message: Any) -> None:
        side.arrived(message.data)
        message.ack()

    pulling: Future[Any] = subscriber.subscribe(subscription, callback=handle)
    try:
        yield side
    finally:
        pulling.cancel()
        publisher.stop()
        subscriber.close()
