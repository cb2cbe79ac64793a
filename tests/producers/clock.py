"""A clock that moves when a test says so."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta


class ManualClock:
    """Implements schemas.ports.Clock."""

    def __init__(self) -> None:
        self._now = datetime(2026, 11, 2, 12, tzinfo=UTC)
        self._sleepers: dict[asyncio.Future[None], datetime] = {}
        self._changed = asyncio.Event()

    def now(self) -> datetime:
        """The time the test has reached."""
        return self._now

    async def sleep(self, seconds: float) -> None:
        """Return once the test has moved on that far."""
        future = asyncio.get_running_loop().create_future()
        self._sleepers[future] = self._now + timedelta(seconds=seconds)
        self._changed.set()
        try:
            await future
        finally:
            self._sleepers.pop(future, None)
            self._changed.set()

    @property
    def sleepers(self) -> int:
        """How many wait for this clock."""
        return len(self._sleepers)

    async def slept_on(self, count: int = 1) -> None:
        """Return when at least so many wait for this clock; fails after 10 s."""
        async with asyncio.timeout(10):
            while self.sleepers < count:
                self._changed.clear()
                await self._changed.wait()

    def advance(self, seconds: float) -> None:
        """Move on, and wake whom that concerns."""
        self._now += timedelta(seconds=seconds)
        for future, until in self._sleepers.items():
            if until <= self._now and not future.done():
                future.set_result(None)
