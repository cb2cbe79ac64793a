"""The bus on Google Cloud Pub/Sub, or on its emulator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial

import google.auth
import grpc.aio
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport

from infra.adapters.pubsub_calls import CHANNEL_OPTIONS, Calls, translated
from infra.adapters.pubsub_lane import Lane
from infra.adapters.pubsub_subscriber import Subscriber
from infra.adapters.pubsub_topology import Topology
from infra.messages import check_message
from schemas.errors import NotFound
from schemas.ports import Delivery, Message, Subscription

HOST = "pubsub.googleapis.com"
SCOPE = "https://www.googleapis.com/auth/pubsub"
MAX_BATCH_MESSAGES = 1_000  # Pub/Sub, for one publish request
MAX_BATCH_BYTES = 9_000_000  # Pub/Sub takes 10,000,000; the rest is for the encoding
ENVELOPE_BYTES = 64  # of a message besides its data and attributes, about


class PubsubBus:
    """Implements schemas.ports.Bus on one channel. Make it, and use it, in one event loop."""

    def __init__(self, channel: grpc.aio.Channel, project: str) -> None:
        self._calls = Calls(channel, project)
        self._lanes: dict[tuple[str, str], Lane[Message, str]] = {}
        self._topology: Topology | None = None

    async def publish(self, topic: str, message: Message) -> str:
        """See Bus.publish. A message with neither data nor attributes raises ValueError.

        Messages of one key are sent one request after the other; when one fails, those waiting behind it do too.
        """
        check_message(message)
        if not message.ordering_key:
            return (await self._publish(topic, [message]))[0]
        place = (topic, message.ordering_key)
        lane = self._lanes.get(place) or self._lanes.setdefault(place, self._lane(topic))
        try:
            return await lane.submit(message)
        finally:
            if lane.idle and self._lanes.get(place) is lane:
                del self._lanes[place]

    @asynccontextmanager
    async def pull(self, subscription: Subscription) -> AsyncIterator[AsyncIterator[Delivery]]:
        """See Bus.pull. A subscription that does not exist raises NotFound at the first message.

        While Pub/Sub does not answer, or the subscription is gone that was there before, the subscriber waits and tries
        again. On leaving, what is held comes again at once, but for released deliveries.
        """
        topology = self._topology
        remake = topology.remake if topology is not None and topology.has(subscription) else None
        subscriber = Subscriber(self._calls, subscription, remake)
        tasks = [asyncio.create_task(subscriber.pull_messages()), asyncio.create_task(subscriber.extend_leases())]
        try:
            yield subscriber
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await subscriber.leave()

    async def create(self, topics: Collection[str], subscriptions: Collection[Subscription]) -> None:
        """Make the topics and subscriptions that are missing: for the emulator, which starts empty. From now on they
        are made again whenever one is found to be gone: an emulator that was started again has forgotten them."""
        self._topology = Topology(self._calls, topics, subscriptions)
        await self._topology.create()

    async def _publish(self, topic: str, messages: Sequence[Message]) -> list[str]:
        try:
            return await self._calls.publish(topic, messages)
        except NotFound:
            if self._topology is None:
                raise
            await self._topology.remake()
            return await self._calls.publish(topic, messages)

    def _lane(self, topic: str) -> Lane[Message, str]:
        send = partial(self._publish, topic)
        return Lane(send, max_items=MAX_BATCH_MESSAGES, weigh=_weight, max_weight=MAX_BATCH_BYTES)


@asynccontextmanager
async def pubsub_bus(
    project: str, emulator: str = "", *, interceptors: Sequence[grpc.aio.ClientInterceptor] = ()
) -> AsyncIterator[PubsubBus]:
    """A bus of this project, by this machine's credentials, or on the emulator at "host:port".

    Raises BusUnavailable where there are no credentials.
    """
    if emulator:
        channel = grpc.aio.insecure_channel(emulator, options=CHANNEL_OPTIONS, interceptors=interceptors)
    else:
        with translated():
            credentials, _ = await asyncio.to_thread(google.auth.default, scopes=[SCOPE])
            channel = PublisherGrpcAsyncIOTransport.create_channel(
                HOST, credentials=credentials, options=CHANNEL_OPTIONS, interceptors=interceptors
            )
    async with channel:
        yield PubsubBus(channel, project)


def _weight(message: Message) -> int:
    attributes = sum(len(name.encode()) + len(value.encode()) for name, value in message.attributes.items())
    return len(message.data) + attributes + ENVELOPE_BYTES
