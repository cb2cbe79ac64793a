"""Saying an event."""

from __future__ import annotations

from producers.intake import Call
from schemas.envelope import encode, wrap
from schemas.events import Event


async def publish(call: Call, event: Event, *, session: str, name: str) -> None:
    """Publish `event` on its topic; returns once it is durable.

    `name` and the session make the event's id, so a repeated request is the same event, which consumers take once.
    Raises BusUnavailable or TooLarge.
    """
    services = call.services
    cloud_event = wrap(
        event,
        subject=session,
        source=services.source,
        time=services.clock.now(),
        id=f"{session}.{name}",
        traceparent=call.traceparent,
    )
    await services.bus.publish(event.topic, encode(cloud_event))
