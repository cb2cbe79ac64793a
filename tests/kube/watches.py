"""Watches: what changed, as a stream of lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from aiohttp import web

from tests.kube.answers import Object, Refused, table
from tests.kube.etcd import Change, Etcd
from tests.kube.streams import TAP, Tap

DEFAULT_SECONDS = 1_800.0  # a watch without timeoutSeconds


@dataclass(frozen=True, slots=True)
class Watch:
    """What one request watches."""

    etcd: Etcd
    resource: str
    kind: str
    namespace: str | None
    matches: Callable[[Object], bool]
    revision: str
    timeout: float
    bookmark_every: float | None  # seconds
    as_table: bool

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer with events until the time is over or the client goes."""
        tap = request[TAP]
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        try:
            async with asyncio.timeout(self.timeout):
                await self._follow(response, tap)
        except TimeoutError:
            if self.bookmark_every is not None:
                await tap.write(response, self._bookmark())
        except Refused as refused:
            await tap.write(response, _line("ERROR", refused.status))
        except ConnectionError:
            pass  # the client, or a fault, broke the connection
        return response

    async def _follow(self, response: web.StreamResponse, tap: Tap) -> None:
        seen = self.etcd.revision
        if self.revision in ("", "0"):
            for thing in self.etcd.all(self.resource, self.namespace):
                if self.matches(thing):
                    await tap.write(response, self._event("ADDED", thing))
        else:
            seen = int(self.revision)
        loop = asyncio.get_running_loop()
        last_bookmark = loop.time()
        while True:
            changes = self.etcd.since(seen)
            for line in self._lines(changes):
                await tap.write(response, line)
            seen = max(seen, changes[-1].revision) if changes else seen
            try:
                async with asyncio.timeout_at(self.bookmark_every and last_bookmark + self.bookmark_every):
                    await self.etcd.news(seen)
            except TimeoutError:
                await tap.write(response, self._bookmark())
                last_bookmark = loop.time()

    def _lines(self, changes: list[Change]) -> Iterator[bytes]:
        for change in changes:
            resource, namespace, _ = change.key
            if resource != self.resource or self.namespace not in (None, namespace):
                continue
            before = change.before is not None and self.matches(change.before)
            after = change.after is not None and self.matches(change.after)
            if after and change.after is not None:
                yield self._event("MODIFIED" if before else "ADDED", change.after)
            elif before:  # removed, or changed so that the selector matches it no more
                gone = change.gone or change.after or change.before
                assert gone is not None
                yield self._event("DELETED", gone)

    def _event(self, kind: str, thing: Object) -> bytes:
        return _line(kind, table([thing], thing["metadata"]["resourceVersion"]) if self.as_table else thing)

    def _bookmark(self) -> bytes:
        metadata = {"resourceVersion": str(self.etcd.revision), "creationTimestamp": None}
        return _line("BOOKMARK", {"kind": self.kind, "apiVersion": "v1", "metadata": metadata})


def _line(kind: str, thing: Object) -> bytes:
    return json.dumps({"type": kind, "object": thing}).encode() + b"\n"
