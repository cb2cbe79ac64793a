"""The embedded profile's scheduler."""

from __future__ import annotations

import logging

from schemas.envelope import encode, wrap
from schemas.errors import PigeonError
from schemas.events import ClockTicked
from schemas.ports import Bus, Clock
from schemas.topics import SCHEDULER_TICKS

SOURCE = "/pigeon/ticker"

logger = logging.getLogger(__name__)


async def tick(bus: Bus, clock: Clock, seconds: float) -> None:
    """Publish clock.ticked at once and then every so many seconds, until cancelled. A tick that fails is skipped."""
    while True:
        now = clock.now()
        try:
            await bus.publish(SCHEDULER_TICKS, encode(wrap(ClockTicked(at=now), subject="", source=SOURCE, time=now)))
        except PigeonError as error:
            logger.warning("a tick was not published: %s", error)
        await clock.sleep(seconds)
