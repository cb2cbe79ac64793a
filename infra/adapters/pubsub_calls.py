"""The calls of Pub/Sub's API that we make: each with a time-out and retries, its errors translated, once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import grpc.aio
from google.api_core import exceptions
from google.api_core.retry import AsyncRetry, if_exception_type
from google.auth.exceptions import GoogleAuthError
from google.pubsub_v1.services.publisher import PublisherAsyncClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
from google.pubsub_v1.services.subscriber import SubscriberAsyncClient
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport
from google.pubsub_v1.types import PublishRequest, PubsubMessage, ReceivedMessage

from schemas.errors import AlreadyExists, BusUnavailable, NotFound, PigeonError
from schemas.ports import Message

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_metadata_size", 4 * 1024 * 1024),  # refusals carry long details
    ("grpc.keepalive_time_ms", 30_000),  # so that a connection which died silently is noticed
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),  # gRPC's own two minutes outlast every lease
)
CALL_SECONDS = 10.0  # of trying, all in all: somebody waits for the answer
PULL_SECONDS = 95.0  # the service answers an empty pull by itself after about 90
TRANSIENT = (
    exceptions.Aborted,
    exceptions.Cancelled,  # by a server or proxy that goes away; ours is asyncio's
    exceptions.DeadlineExceeded,
    exceptions.InternalServerError,
    exceptions.ResourceExhausted,
    exceptions.ServiceUnavailable,
    exceptions.Unknown,
)
RETRY = AsyncRetry(predicate=if_exception_type(*TRANSIENT), initial=0.05, multiplier=2.0, maximum=1.0)
TRY_SHARE = 0.3  # of the time for a call that one try may take: a lost answer leaves time for another


class Calls:
    """Pub/Sub as the few calls that a bus is made of. Every one raises NotFound or BusUnavailable."""

    def __init__(self, channel: grpc.aio.Channel, project: str) -> None:
        self._project = project
        self.publisher = PublisherAsyncClient(transport=PublisherGrpcAsyncIOTransport(channel=channel))
        self.subscriber = SubscriberAsyncClient(transport=SubscriberGrpcAsyncIOTransport(channel=channel))

    def topic(self, name: str) -> str:
        """The topic's full name."""
        return f"projects/{self._project}/topics/{name}"

    def subscription(self, name: str) -> str:
        """The subscription's full name."""
        return f"projects/{self._project}/subscriptions/{name}"

    async def publish(self, topic: str, messages: Sequence[Message]) -> list[str]:
        """The ids of the messages, in order. All have the same ordering key."""
        request = PublishRequest(topic=self.topic(topic), messages=[_outgoing(message) for message in messages])
        with translated():
            response = await self.publisher.publish(request, retry=RETRY.with_timeout(CALL_SECONDS), timeout=_tries())
        return list(response.message_ids)

    async def pull(self, subscription: str, limit: int) -> list[ReceivedMessage]:
        """At most that many messages; waits for the first one, and may return none."""
        request = {"subscription": self.subscription(subscription), "max_messages": limit}
        with translated():
            try:
                response = await self.subscriber.pull(request, retry=None, timeout=PULL_SECONDS)
            except exceptions.DeadlineExceeded:
                return []
        return list(response.received_messages)

    async def acknowledge(self, subscription: str, ack_ids: Sequence[str]) -> None:
        """Settle these deliveries."""
        request = {"subscription": self.subscription(subscription), "ack_ids": ack_ids}
        with translated():
            await self.subscriber.acknowledge(request, retry=RETRY.with_timeout(CALL_SECONDS), timeout=_tries())

    async def extend(self, subscription: str, ack_ids: Sequence[str], deadline: int, *, within: float) -> None:
        """Let the leases of these deliveries end `deadline` seconds from now (0: at once)."""
        request = {
            "subscription": self.subscription(subscription),
            "ack_ids": ack_ids,
            "ack_deadline_seconds": deadline,
        }
        with translated():
            await self.subscriber.modify_ack_deadline(
                request, retry=RETRY.with_timeout(within), timeout=within * TRY_SHARE
            )


def _tries() -> float:
    return CALL_SECONDS * TRY_SHARE


def _outgoing(message: Message) -> PubsubMessage:
    return PubsubMessage(data=message.data, attributes=dict(message.attributes), ordering_key=message.ordering_key)


@contextmanager
def translated() -> Iterator[None]:
    """Turn the errors of gRPC, of its retries and of credentials into ours."""
    try:
        yield
    except (exceptions.GoogleAPIError, GoogleAuthError, grpc.RpcError) as error:
        raise _ours(error) from error


def _ours(error: Exception) -> PigeonError:
    match error:
        case exceptions.NotFound():
            return NotFound(str(error.message))
        case exceptions.AlreadyExists():
            return AlreadyExists(str(error.message))
        case exceptions.GoogleAPICallError():
            return BusUnavailable(f"Pub/Sub: {error.message}")
    return BusUnavailable(f"Pub/Sub: {error}")
