"""Messages that come by HTTP: Pub/Sub's push subscriptions, and Eventarc."""

from __future__ import annotations

import asyncio
import base64
import logging
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import FrameType
from typing import Protocol

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from consumers.context import Context
from consumers.worker import Worker
from schemas.errors import Forbidden, Malformed, Unauthenticated
from schemas.ports import Message, Subscription

HAND_OVER_SECONDS = 540.0  # when a tender hands its session on
ANSWER_SECONDS = 580.0  # when the request must be over: Pub/Sub waits 600 s, the longest ack deadline
RETRY_AFTER_SECONDS = 1
METADATA = "x-goog-pubsub-"  # headers of an unwrapped push that writes its metadata
ATTRIBUTES = ("ce-", "content-type", "pigeon-")  # headers that were attributes of ours
STRUCTURED = "application/cloudevents+json"

log = logging.getLogger(__name__)


class Pusher(Protocol):
    """Who may push."""

    async def verify(self, token: str) -> None:
        """Raises Unauthenticated, Forbidden or Unavailable."""


@dataclass(frozen=True, slots=True)
class PushServices:
    """What the push functions need. Once `stopping` is set sessions are handed over, and messages are not taken."""

    context: Context
    pusher: Pusher
    hand_over_seconds: float = HAND_OVER_SECONDS
    answer_seconds: float = ANSWER_SECONDS
    stopping: asyncio.Event = field(default_factory=asyncio.Event)


def set_at_sigterm(event: asyncio.Event) -> None:
    """Set it when this process is asked to end, beside what its server does then, which is to wait for the requests
    under way: a tender's takes minutes, and an instance is killed after ten seconds. Without a server that listens to
    the signal nothing is changed. Call it on the main thread, in the server's event loop."""
    loop, others = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)
    if not callable(others):
        return

    def ask(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(event.set)
        others(number, frame)

    signal.signal(signal.SIGTERM, ask)


async def answer(services: PushServices, subscription: Subscription, request: Request) -> Response:
    """Handle one pushed message of a subscription. 204 settles it, and 503 lets Pub/Sub push it again, with back-off;
    401 and 403 say that this is not our subscription, 400 that this is no push."""
    try:
        await services.pusher.verify(_bearer(request.headers.get("authorization", "")))
        delivery = read(request.headers, await request.body())
    except Unauthenticated as error:
        return _refusal(401, error)
    except Forbidden as error:
        return _refusal(403, error)
    except Malformed as error:
        return _refusal(400, error)
    if not services.stopping.is_set():
        await _handle(services, subscription, delivery)
    if delivery.acked:
        return Response(status_code=204)
    return Response(status_code=503, headers={"retry-after": str(RETRY_AFTER_SECONDS)})


async def _handle(services: PushServices, subscription: Subscription, delivery: PushDelivery) -> None:
    worker = Worker(services.context)
    loop = asyncio.get_running_loop()
    stopping = asyncio.create_task(_stop(worker, services.stopping))
    alarms = (
        loop.call_later(services.hand_over_seconds, worker.stop),
        loop.call_later(services.answer_seconds, delivery.expire),
    )
    try:
        await worker.handle(subscription, delivery)
    finally:
        stopping.cancel()
        for alarm in alarms:
            alarm.cancel()


async def _stop(worker: Worker, stopping: asyncio.Event) -> None:
    await stopping.wait()
    worker.stop()


def _bearer(header: str) -> str:
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("the request has no bearer token")
    return token.strip()


def _refusal(status: int, error: Exception) -> Response:
    log.warning("a push request is refused: %s", error)
    return Response(str(error), status_code=status, media_type="text/plain")


class PushDelivery:
    """Implements schemas.ports.Delivery: the answer to the request is the settlement.

    `attempt` is 1 where the push does not say.
    """

    def __init__(self, message: Message, message_id: str, attempt: int, published_at: datetime) -> None:
        self.acked = False
        self.message = message
        self.message_id = message_id
        self.attempt = attempt
        self.published_at = published_at
        self._over = asyncio.Event()

    async def ack(self) -> None:
        """See Delivery.ack."""
        self.acked = True

    async def nack(self) -> None:
        """See Delivery.nack."""

    def release(self) -> None:
        """See Delivery.release. Nothing can be left open: what is not settled is pushed again."""

    async def lost(self) -> None:
        """See Delivery.lost: Pub/Sub waits no longer."""
        await self._over.wait()

    def expire(self) -> None:
        """The request's time is over."""
        self._over.set()


class _Pushed(BaseModel):
    model_config = ConfigDict(extra="ignore")

    data: bytes = b""
    attributes: dict[str, str] = {}
    message_id: str = Field(validation_alias=AliasChoices("messageId", "message_id"))
    publish_time: datetime = Field(validation_alias=AliasChoices("publishTime", "publish_time"))
    ordering_key: str = Field("", validation_alias=AliasChoices("orderingKey", "ordering_key"))


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore")

    message: _Pushed
    attempt: int = Field(1, validation_alias="deliveryAttempt", ge=0)


def read(headers: Mapping[str, str], body: bytes) -> PushDelivery:
    """The message in a push request: unwrapped with its metadata in headers, wrapped, or wrapped by Eventarc.

    Raises Malformed.
    """
    try:
        if METADATA + "message-id" in headers:
            return _unwrapped(headers, body)
        return _wrapped(headers, body)
    except (ValueError, ValidationError) as error:
        raise Malformed(f"this is no message that Pub/Sub pushed: {error}") from error


def _unwrapped(headers: Mapping[str, str], body: bytes) -> PushDelivery:
    attributes = {name: value for name, value in headers.items() if name.startswith(ATTRIBUTES)}
    published = datetime.fromisoformat(headers[METADATA + "publish-time"])
    key = headers.get(METADATA + "ordering-key", "")
    return PushDelivery(Message(body, attributes, key), headers[METADATA + "message-id"], 1, _aware(published))


def _wrapped(headers: Mapping[str, str], body: bytes) -> PushDelivery:
    parsed = _Event.model_validate_json(body).data if _structured(headers) else _Body.model_validate_json(body)
    pushed = parsed.message
    message = Message(base64.b64decode(pushed.data, validate=True), pushed.attributes, pushed.ordering_key)
    return PushDelivery(message, pushed.message_id, max(1, parsed.attempt), _aware(pushed.publish_time))


class _Event(BaseModel):
    model_config = ConfigDict(extra="ignore")

    data: _Body


def _structured(headers: Mapping[str, str]) -> bool:
    return headers.get("content-type", "").startswith(STRUCTURED)


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
