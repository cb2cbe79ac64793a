"""The floors: Pub/Sub and Firestore by Google's own clients, with as little around each call as can be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from google.auth.credentials import AnonymousCredentials
from google.cloud.firestore_v1 import AsyncClient
from google.cloud.firestore_v1.services.firestore import FirestoreAsyncClient
from google.cloud.firestore_v1.services.firestore.transports import FirestoreGrpcAsyncIOTransport
from google.cloud.firestore_v1.types import ListenRequest, ListenResponse
from google.pubsub_v1.services.publisher import PublisherAsyncClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
from google.pubsub_v1.services.subscriber import SubscriberAsyncClient
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport
from google.pubsub_v1.types import PubsubMessage, ReceivedMessage

PULLED = 1_000  # messages of one pull
LISTENED = 8  # documents of a collection before the next one: the emulator sends all of them again with each new one
SIZES = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
OWNER = [("authorization", "Bearer owner")]  # the emulator's name for who may do everything


class BareBus:
    """One topic and one ordered subscription, on the generated async clients."""

    def __init__(self, channel: grpc.aio.Channel, project: str) -> None:
        self._publisher = PublisherAsyncClient(transport=PublisherGrpcAsyncIOTransport(channel=channel))
        self._subscriber = SubscriberAsyncClient(transport=SubscriberGrpcAsyncIOTransport(channel=channel))
        self._topic = f"projects/{project}/topics/bare"
        self._subscription = f"projects/{project}/subscriptions/bare"

    async def create(self) -> None:
        """Make both."""
        await self._publisher.create_topic({"name": self._topic})
        wanted = {"name": self._subscription, "topic": self._topic, "enable_message_ordering": True}
        await self._subscriber.create_subscription(wanted)

    async def publish(self, data: bytes, key: str) -> None:
        """One message in a request of its own."""
        await self._publisher.publish(topic=self._topic, messages=[PubsubMessage(data=data, ordering_key=key)])

    async def pull(self) -> list[ReceivedMessage]:
        """What has come; waits for the first message."""
        request = {"subscription": self._subscription, "max_messages": PULLED}
        return list((await self._subscriber.pull(request, timeout=95.0)).received_messages)

    async def acknowledge(self, received: list[ReceivedMessage]) -> None:
        """Settle these."""
        ids = [each.ack_id for each in received]
        await self._subscriber.acknowledge(subscription=self._subscription, ack_ids=ids)


@asynccontextmanager
async def bare_bus(host: str, project: str) -> AsyncIterator[BareBus]:
    """Open one on the emulator."""
    async with grpc.aio.insecure_channel(host, options=SIZES) as channel:
        bus = BareBus(channel, project)
        await bus.create()
        yield bus


class BareStore:
    """`create()` of the AsyncClient, and one raw Listen stream at a time."""

    def __init__(self, channel: grpc.aio.Channel, project: str) -> None:
        self.client = AsyncClient(project=project, credentials=AnonymousCredentials())  # type: ignore[no-untyped-call]
        transport = FirestoreGrpcAsyncIOTransport(channel=channel)
        self.client._firestore_api_internal = FirestoreAsyncClient(transport=transport)
        self.client._emulator_host = ""  # it would make a channel of its own
        self._channel = channel
        self._database = f"projects/{project}/databases/(default)"

    async def create(self, path: str, data: dict[str, Any]) -> None:
        """Write a new document."""
        await self.client.document(path).create(data)

    @asynccontextmanager
    async def listen(self, collection: str) -> AsyncIterator[asyncio.Queue[Any]]:
        """A queue of the documents of an empty collection, each when it is first shown."""
        call = self._channel.stream_stream(
            "/google.firestore.v1.Firestore/Listen",
            request_serializer=ListenRequest.serialize,
            response_deserializer=ListenResponse.pb().FromString,
        )(metadata=[*OWNER, ("google-cloud-resource-prefix", self._database)])
        parent, _, name = f"{self._database}/documents/{collection}".rpartition("/")
        query = {"parent": parent, "structured_query": {"from_": [{"collection_id": name}]}}
        await call.write(ListenRequest(database=self._database, add_target={"target_id": 1, "query": query}))
        while (await call.read()).target_change.target_change_type != 3:  # CURRENT
            pass
        shown: asyncio.Queue[Any] = asyncio.Queue()
        reading = asyncio.create_task(_read(call, shown))
        try:
            yield shown
        finally:
            reading.cancel()
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)


async def _read(call: grpc.aio.StreamStreamCall, shown: asyncio.Queue[Any]) -> None:
    seen: set[str] = set()
    while (response := await call.read()) is not grpc.aio.EOF:
        document = response.document_change.document
        if document.name and document.name not in seen:
            seen.add(document.name)
            shown.put_nowait(document)


@asynccontextmanager
async def bare_store(host: str, project: str) -> AsyncIterator[BareStore]:
    """Open one on the emulator."""
    async with grpc.aio.insecure_channel(host, options=SIZES) as channel:
        yield BareStore(channel, project)
