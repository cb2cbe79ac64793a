"""Work of which one run at a time is enough."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Rounds:
    """Runs rounds one after the other; any number of calls during a round share just one more."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._wanted = False

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Return when a round that began after this call is over; raises what `work` raises.

        Every caller waits for it: were a round left to somebody else, it would be lost when that one is cancelled.
        """
        self._wanted = True
        async with self._lock:
            if not self._wanted:
                return
            self._wanted = False
            try:
                await work()
            except BaseException:
                self._wanted = True
                raise
