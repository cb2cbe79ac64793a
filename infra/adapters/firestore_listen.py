"""Listeners on the raw Listen stream. What a target shows is put together without I/O; Listener brings the messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc.aio

from infra.adapters.firestore_calls import Calls, ListenRequest, received, translated
from infra.adapters.firestore_values import Database, Message
from schemas.errors import StoreUnavailable

TARGET = 1  # the only one of its stream
START_SECONDS = 10.0  # until a target shows its documents for the first time


class View:
    """What one target shows: the documents by name, complete whenever `feed` says so."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.documents: dict[str, Message] = {}
        self._current = False

    def feed(self, response: Message) -> bool:
        """Take one message; whether the view is now the state of the database at one moment.

        Raises StoreUnavailable when the server takes the target away.
        """
        kind = response.WhichOneof("response_type")
        if kind == "target_change":
            return self._feed_target(response.target_change)
        if kind == "document_change":
            change = response.document_change
            if self.target in change.target_ids:
                self.documents[change.document.name] = change.document
            elif self.target in change.removed_target_ids:
                self.documents.pop(change.document.name, None)
        elif kind in ("document_delete", "document_remove"):
            removal = getattr(response, kind)
            if self.target in removal.removed_target_ids:
                self.documents.pop(removal.document, None)
        return False

    def _feed_target(self, change: Message) -> bool:
        if change.target_change_type == change.NO_CHANGE:
            return self._current and not change.target_ids and change.HasField("read_time")
        if change.target_ids and self.target not in change.target_ids:
            return False
        if change.target_change_type == change.RESET:
            self.documents.clear()
            self._current = False
        elif change.target_change_type == change.CURRENT:
            self._current = True
        elif change.target_change_type == change.REMOVE:
            raise StoreUnavailable(f"the listener was removed: {change.cause.code} {change.cause.message}")
        return False


class Listener:
    """One Listen stream, aimed at one target."""

    def __init__(self, call: grpc.aio.StreamStreamCall, database: Database) -> None:
        self._call = call
        self._database = database
        self._view = View(TARGET)
        self._started = False

    async def aim(self, fill: Callable[[Message], None]) -> None:
        """Listen to what `fill` makes of a target; once, and before `state`. Raises StoreUnavailable."""
        request = ListenRequest(database=self._database.name)
        request.add_target.target_id = TARGET
        fill(request.add_target)
        with translated():
            await self._call.write(request)

    async def state(self) -> dict[str, Message]:
        """The documents by name, when they have been put together anew. Raises StoreUnavailable."""
        try:
            async with asyncio.timeout(None if self._started else START_SECONDS):
                while not self._view.feed(await self._next()):
                    pass
        except TimeoutError as error:
            raise StoreUnavailable(f"a listener showed nothing in {START_SECONDS:g} s") from error
        self._started = True
        return self._view.documents

    async def _next(self) -> Message:
        with translated():
            response = received(await self._call.read())
        if response is grpc.aio.EOF:
            raise StoreUnavailable("the store ended a listener")
        return response


@asynccontextmanager
async def listener(calls: Calls, database: Database) -> AsyncIterator[Listener]:
    """A Listen stream for the length of the context."""
    async with calls.listen() as call:
        yield Listener(call, database)
