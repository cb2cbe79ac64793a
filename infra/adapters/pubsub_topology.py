"""Topics and subscriptions as Pub/Sub's API wants them, from schemas.topics. Terraform makes them in production;
the emulator's are made here."""

from __future__ import annotations

import math
from collections.abc import Collection
from datetime import timedelta
from typing import Any

from infra.adapters.pubsub_calls import CALL_SECONDS, RETRY, Calls, translated
from schemas.errors import AlreadyExists
from schemas.ports import Subscription
from schemas.topics import DEAD_LETTERS

PUSH_SECONDS = 600  # the longest ack deadline, which is how long a pushed message's request may take
MIN_ATTEMPTS, MAX_ATTEMPTS = 5, 100  # what a dead-letter policy takes


async def create_topology(calls: Calls, topics: Collection[str], subscriptions: Collection[Subscription]) -> None:
    """Make what is missing; what is there stays as it is. Raises BusUnavailable, NotFound (a topic)."""
    options: dict[str, Any] = {"retry": RETRY.with_timeout(CALL_SECONDS), "timeout": CALL_SECONDS}
    for topic in sorted({*topics, DEAD_LETTERS}):
        try:
            with translated():
                await calls.publisher.create_topic({"name": calls.topic(topic)}, **options)
        except AlreadyExists:
            continue
    for subscription in subscriptions:
        try:
            with translated():
                await calls.subscriber.create_subscription(policy(calls, subscription), **options)
        except AlreadyExists:
            continue


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
