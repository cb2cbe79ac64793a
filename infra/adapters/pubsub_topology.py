"""Topics and subscriptions as Pub/Sub's API wants them, from schemas.topics. Terraform makes them in production;
the emulator's are made here."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Collection
from datetime import timedelta
from typing import Any

from infra.adapters.pubsub_calls import CALL_SECONDS, RETRY, Calls, translated
from schemas.errors import AlreadyExists
from schemas.ports import Subscription
from schemas.topics import DEAD_LETTERS

PUSH_SECONDS = 600  # the longest ack deadline, which is how long a pushed message's request may take
MIN_ATTEMPTS, MAX_ATTEMPTS = 5, 100  # what a dead-letter policy takes

log = logging.getLogger(__name__)


class Topology:
    """Topics and subscriptions that are made where they are missing."""

    def __init__(self, calls: Calls, topics: Collection[str], subscriptions: Collection[Subscription]) -> None:
        self._calls = calls
        self._topics = sorted({*topics, DEAD_LETTERS})
        self._subscriptions = tuple(subscriptions)
        self._remaking = asyncio.Lock()

    def has(self, subscription: Subscription) -> bool:
        """Whether it is one of these."""
        return subscription in self._subscriptions

    async def remake(self) -> None:
        """Something of it is gone: make what is missing, and say so. Raises BusUnavailable."""
        async with self._remaking:
            log.warning("Pub/Sub has lost topics or subscriptions, and what was in them: they are made again")
            await self.create()

    async def create(self) -> None:
        """Make what is missing; what is there stays as it is. Raises BusUnavailable, NotFound (a topic).

        A topic's subscriptions come right after it: what is published in between has no reader.
        """
        for topic in self._topics:
            name = self._calls.topic(topic)
            await _unless_there(self._calls.publisher.create_topic({"name": name}, **_options()))
            for subscription in self._subscriptions:
                if subscription.topic == topic:
                    await self._subscribe(subscription)

    async def _subscribe(self, subscription: Subscription) -> None:
        resource = policy(self._calls, subscription)
        await _unless_there(self._calls.subscriber.create_subscription(resource, **_options()))


def _options() -> dict[str, Any]:
    return {"retry": RETRY.with_timeout(CALL_SECONDS), "timeout": CALL_SECONDS}


async def _unless_there(call: Awaitable[object]) -> None:
    try:
        with translated():
            await call
    except AlreadyExists:
        return


def policy(calls: Calls, subscription: Subscription) -> dict[str, Any]:
    """The subscription resource. Raises ValueError for attempts beyond what Pub/Sub counts.

    Only an unordered subscription backs off: on an ordered one it would hold up the whole key. Dead letters have no
    dead letters of their own.
    """
    if not MIN_ATTEMPTS <= subscription.max_attempts <= MAX_ATTEMPTS:
        raise ValueError(f"{subscription.name}: Pub/Sub takes {MIN_ATTEMPTS} to {MAX_ATTEMPTS} attempts")
    resource: dict[str, Any] = {
        "name": calls.subscription(subscription.name),
        "topic": calls.topic(subscription.topic),
        "ack_deadline_seconds": max(1, math.ceil(subscription.ack_deadline)),
        "enable_message_ordering": subscription.ordered,
        "message_retention_duration": timedelta(seconds=subscription.retention),
        "expiration_policy": {},  # never: idle for a month is not forgotten
    }
    if not subscription.ordered:
        resource["retry_policy"] = {
            "minimum_backoff": timedelta(seconds=subscription.retry_min),
            "maximum_backoff": timedelta(seconds=subscription.retry_max),
        }
    if subscription.topic != DEAD_LETTERS:
        resource["dead_letter_policy"] = {
            "dead_letter_topic": calls.topic(DEAD_LETTERS),
            "max_delivery_attempts": subscription.max_attempts,
        }
    return resource


def push_policy(
    calls: Calls, subscription: Subscription, *, endpoint: str, service_account: str, audience: str
) -> dict[str, Any]:
    """The same, pushed to an endpoint with a token for `audience` that Google signs for the service account."""
    token = {"service_account_email": service_account, "audience": audience}
    push = {"push_endpoint": endpoint, "oidc_token": token}
    return {**policy(calls, subscription), "ack_deadline_seconds": PUSH_SECONDS, "push_config": push}
