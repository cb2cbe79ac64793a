"""Server-sent events as a browser reads them."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tests.producers.world import authorization


@dataclass(frozen=True)
class Event:
    """One event; a comment is an event of type "comment" without data."""

    type: str
    data: Any = None
    id: str = ""

    @property
    def bytes(self) -> bytes:
        """The bytes of the transcript that a message carries."""
        return base64.b64decode(self.data["data"], validate=True)


def parse(block: str) -> Event:
    """One block of lines."""
    if block.startswith(":"):
        return Event("comment")
    fields = dict(line.split(": ", 1) for line in block.split("\n"))
    return Event(fields.get("event", "message"), json.loads(fields["data"]), fields.get("id", ""))


class Stream:
    """An open stream."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._blocks = self._read()

    async def _read(self) -> AsyncIterator[Event]:
        rest = ""
        async for text in self.response.aiter_text():
            *blocks, rest = (rest + text).split("\n\n")
            for block in blocks:
                yield parse(block)
        assert rest == ""

    async def next(self) -> Event:
        """The next event."""
        return await self.next_of()

    async def next_of(self, *types: str) -> Event:
        """The next event of these types, or of any."""
        async for event in self._blocks:
            if not types or event.type in types:
                return event
        raise AssertionError(f"the stream ended without {types or 'an event'}")

    async def rest(self) -> list[Event]:
        """Everything up to the end of the stream."""
        return [event async for event in self._blocks]


@asynccontextmanager
async def stream(
    address: str, session: str, *, user: str = "alice", params: dict[str, Any] | None = None, **headers: str
) -> AsyncIterator[Stream]:
    """Open a stream, as `user`, at a real server."""
    given = {**authorization(user), **{name.replace("_", "-"): value for name, value in headers.items()}}
    url = f"{address}/terminal-stream-output/{session}"
    async with (
        httpx.AsyncClient(timeout=20, trust_env=False) as client,
        client.stream("GET", url, headers=given, params=params) as response,
    ):
        assert response.status_code == 200, await response.aread()
        yield Stream(response)
