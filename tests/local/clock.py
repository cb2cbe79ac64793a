"""A clock that moves when told."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta


class HandClock:
    """Implements schemas.ports.Clock. Sleepers wake when `advance` passes their time."""

    def __init__(self) -> None:
        self._now = datetime(2026, 3, 1, tzinfo=UTC)
        self._moved = asyncio.Event()

    def now(self) -> datetime:
        """See Clock.now."""
        return self._now

    async def sleep(self, seconds: float) -> None:
        """See Clock.sleep."""
        end = self._now + timedelta(seconds=seconds)
        while self._now < end:
            await self._moved.wait()

    def advance(self, seconds: float) -> None:
        """Let that much time pass."""
        self._now += timedelta(seconds=seconds)
        self._moved.set()
        self._moved = asyncio.Event()
