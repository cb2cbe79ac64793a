"""The embedded profile's scheduler."""

from __future__ import annotations

import logging

from infra.profiles import Ports
from schemas.envelope import encode, wrap
from schemas.errors import PigeonError
from schemas.events import ClockTicked
from schemas.topics import SCHEDULER_TICKS

SOURCE = "/pigeon/ticker"
PRUNE_LIMIT = 1_000  # documents a tick

logger = logging.getLogger(__name__)


async def tick(ports: Ports, seconds: float) -> None:
    """Publish clock.ticked and remove expired documents, at once and then every so many seconds, until cancelled.

    What fails is left to the next tick.
    """
    while True:
        now = ports.clock.now()
        try:
            await ports.bus.publish(
                SCHEDULER_TICKS, encode(wrap(ClockTicked(at=now), subject="", source=SOURCE, time=now))
            )
        except PigeonError as error:
            logger.warning("a tick was not published: %s", error)
        try:
            if ports.prune is not None:
                await ports.prune(now, PRUNE_LIMIT)
        except PigeonError as error:
            logger.warning("expired documents were not removed: %s", error)
        await ports.clock.sleep(seconds)
