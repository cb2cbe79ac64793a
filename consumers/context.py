"""What every handler is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from consumers.controls import Controls
from consumers.rounds import Rounds
from schemas.envelope import encode, wrap
from schemas.events import Event
from schemas.limits import Limits
from schemas.ports import Bus, Clock, Sandboxes, Store


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
        message = encode(wrap(event, subject=subject, source=self.source, time=self.now(), id=id))
        await self.bus.publish(event.topic, message)
