"""Clocks: this machine's, and one that is set by a service whose time everybody shares."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta

from schemas.ports import Clock

NOTEWORTHY = timedelta(seconds=1)  # a correction that says that a machine's clock is wrong

log = logging.getLogger(__name__)


class SystemClock:
    """Wall-clock time in UTC and the event loop's sleep."""

    def now(self) -> datetime:
        """The current time, aware, in UTC."""
        return datetime.now(UTC)

    async def sleep(self, seconds: float) -> None:
        """Return after that many seconds."""
        await asyncio.sleep(seconds)


class ServiceClock:
    """Implements schemas.ports.Clock: the time of a service, told by this machine's clock and the service's answers.

    An answer that carries the time of what was done says how far our own clock may be off: it was done after we asked
    and before the answer was here. The correction is changed no more than that demands, so that a clock which is right
    to within a round trip stays as it is, and one that was set anew is corrected at the next answer.
    """

    def __init__(self, own: Clock) -> None:
        self._own = own
        self._ahead = timedelta(0)  # of our own clock, the service's

    def now(self) -> datetime:
        """The service's current time, to within the round trip of a call."""
        return self._own.now() + self._ahead

    async def sleep(self, seconds: float) -> None:
        """Return after that many seconds."""
        await self._own.sleep(seconds)

    def asked(self) -> datetime:
        """What to note before a call, for `told`."""
        return self._own.now()

    def told(self, time: datetime, asked: datetime) -> None:
        """The service says that it did at `time` what it was asked for then; call this as soon as it has answered."""
        least, most = time - self._own.now(), time - asked
        if least > most:
            return  # our own clock was set back meanwhile: the next answer will tell
        ahead = max(least, min(self._ahead, most))
        if abs(ahead - self._ahead) >= NOTEWORTHY:
            log.warning("this machine's clock is off: the service's is %.3f s ahead of it", ahead.total_seconds())
        self._ahead = ahead
