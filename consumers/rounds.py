"""Work of which one run at a time is enough."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Rounds:
    """Runs rounds one after the other; any number of calls during a round cause just one more."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._wanted = False

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work`, or leave it to the round under way to run once more; raises what `work` raises."""
        self._wanted = True
        if self._lock.locked():
            return
        async with self._lock:
            while self._wanted:
                self._wanted = False
                await work()
