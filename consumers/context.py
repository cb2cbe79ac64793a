"""What every handler is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime

from consumers.controls import Controls
from consumers.rounds import Rounds
from schemas.envelope import CloudEvent, decode, encode, wrap
from schemas.errors import MalformedEvent
from schemas.events import Event
from schemas.ids import is_session_id
from schemas.limits import Limits
from schemas.ports import Bus, Clock, Message, Sandboxes, Store
from schemas.topics import SESSION_EVENTS, SESSION_LINKS

SESSION_TOPICS = frozenset({SESSION_EVENTS, SESSION_LINKS})


@dataclass(frozen=True, slots=True)
class Context:
    """The ports and the limits of one worker process.

    `notice` is printed as the first line of every session's transcript ("" for none).
    """

    store: Store
    bus: Bus
    sandboxes: Sandboxes
    clock: Clock
    limits: Limits
    controls: Controls
    source: str = "/consumers"
    notice: str = ""
    admission: Rounds = field(default_factory=Rounds)
    filling: Rounds = field(default_factory=Rounds)

    def now(self) -> datetime:
        """The clock's time."""
        return self.clock.now()

    async def publish(self, event: Event, subject: str, *, id: str | None = None) -> None:
        """Say something on the event's topic. Raises BusUnavailable."""
        answer = wrap(
            event, subject=subject, source=self.source, time=self.now(), id=id, traceparent=_traceparent.get()
        )
        await self.bus.publish(event.topic, encode(answer))


def read_event(message: Message) -> CloudEvent:
    """The event in a message; its subject can be trusted in a document's path. Raises MalformedEvent."""
    cloud_event = decode(message)
    if cloud_event.event.topic in SESSION_TOPICS and not is_session_id(cloud_event.subject):
        raise MalformedEvent(f"ce-subject is {cloud_event.subject[:80]!r}, which is no session", message.data)
    return cloud_event


_traceparent: ContextVar[str] = ContextVar("traceparent", default="")


@contextmanager
def answering(cloud_event: CloudEvent) -> Iterator[None]:
    """What is published in this block, and in tasks that it starts, carries this event's trace context."""
    token = _traceparent.set(cloud_event.traceparent)
    try:
        yield
    finally:
        _traceparent.reset(token)
