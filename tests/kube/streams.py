"""Where long answers leave the server, and where they are cut or freeze at a given byte."""

from __future__ import annotations

import asyncio

from aiohttp import web

from tests.kube.faults import Fault


class Tap:
    """Counts the bytes of one answer's body and carries out its fault."""

    def __init__(self, request: web.Request, fault: Fault | None) -> None:
        self._transport = request.transport
        self._cut = fault.cut if fault else None
        self._freeze = fault.freeze if fault else None
        self.written = 0

    @property
    def frozen(self) -> bool:
        """Whether nothing moves any more."""
        return self._freeze is not None and self.written >= self._freeze

    async def write(self, response: web.StreamResponse, data: bytes) -> None:
        """Write to a body. Raises ConnectionError once it is cut."""
        if passed := self.admit(data):
            await response.write(passed)
        await self.after()

    def admit(self, data: bytes) -> bytes:
        """What of the next bytes still gets through."""
        limits = [limit for limit in (self._cut, self._freeze) if limit is not None]
        passed = data[: max(0, min(limits) - self.written)] if limits else data
        self.written += len(passed)
        return passed

    async def after(self) -> None:
        """To be called when what was admitted is out: cut or freeze here, if that byte is reached."""
        if self._cut is not None and self.written >= self._cut:
            if self._transport is not None:
                self._transport.abort()
            raise ConnectionResetError("cut by a fault")
        if self.frozen:
            await asyncio.Event().wait()  # until the server is closed


TAP = web.RequestKey("tap", Tap)  # of a request
