"""CloudEvents 1.0 in Pub/Sub messages, binary mode: attributes `ce-*` and `content-type`, JSON data.

Source of the mapping: CloudEvents Pub/Sub protocol binding, version 1.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from schemas.errors import MalformedEvent
from schemas.events import EVENTS, Event
from schemas.ids import new_id
from schemas.ports import Message
from schemas.topics import ORDERED_TOPICS

SPEC_VERSION = "1.0"
CONTENT_TYPE = "application/json"
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C trace context


@dataclass(frozen=True, slots=True)
class CloudEvent:
    """An event with its envelope. `subject` is the session id ("" on the scheduler's topic)."""

    event: Event
    subject: str
    id: str
    time: datetime
    source: str
    traceparent: str = ""


def wrap(
    event: Event, *, subject: str, source: str, time: datetime, id: str | None = None, traceparent: str = ""
) -> CloudEvent:
    """Put an event into an envelope; without an `id` it gets a random one."""
    return CloudEvent(event, subject, id or new_id(), time, source, traceparent)


def encode(cloud_event: CloudEvent) -> Message:
    """The message that carries this event; ordered by session where its topic is ordered."""
    event = cloud_event.event
    attributes = {
        "ce-specversion": SPEC_VERSION,
        "ce-id": cloud_event.id,
        "ce-source": cloud_event.source,
        "ce-type": event.type,
        "ce-time": cloud_event.time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "content-type": CONTENT_TYPE,
    }
    if cloud_event.subject:
        attributes["ce-subject"] = cloud_event.subject
    if cloud_event.traceparent:
        attributes["ce-traceparent"] = cloud_event.traceparent
    ordering_key = cloud_event.subject if event.topic in ORDERED_TOPICS else ""
    return Message(event.model_dump_json(by_alias=True).encode(), attributes, ordering_key)


def decode(message: Message) -> CloudEvent:
    """The event in a message. Raises MalformedEvent, with the bytes, for anything that is not one of ours."""
    try:
        return _decode(message.data, message.attributes)
    except (ValueError, OverflowError) as error:
        raise MalformedEvent(_reason(error), message.data) from error


def _decode(data: bytes, attributes: Mapping[str, str]) -> CloudEvent:
    if attributes.get("ce-specversion") != SPEC_VERSION:
        raise ValueError(f"ce-specversion is {attributes.get('ce-specversion')!r}, not '{SPEC_VERSION}'")
    kind = EVENTS.get(attributes.get("ce-type", ""))
    if kind is None:
        raise ValueError(f"unknown event type {attributes.get('ce-type')!r}")
    if attributes.get("content-type", CONTENT_TYPE).partition(";")[0].strip() != CONTENT_TYPE:
        raise ValueError(f"content-type is {attributes['content-type']!r}, not '{CONTENT_TYPE}'")
    for name in ("ce-id", "ce-source", "ce-time"):
        if not attributes.get(name):
            raise ValueError(f"{name} is missing")
    traceparent = attributes.get("ce-traceparent", "")
    return CloudEvent(
        event=kind.model_validate_json(data),
        subject=attributes.get("ce-subject", ""),
        id=attributes["ce-id"],
        time=_time(attributes["ce-time"]),
        source=attributes["ce-source"],
        traceparent=traceparent if TRACEPARENT.fullmatch(traceparent) else "",
    )


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError("ce-time has no time zone")
    return time.astimezone(UTC)


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(_line(item) for item in error.errors(include_url=False, include_input=False))
    return str(error)


def _line(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    return f"{where}: {item['msg']}" if where else str(item["msg"])
