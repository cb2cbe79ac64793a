"""Firestore's remote calls: channels, deadlines, retries, and the one place where gRPC's errors become ours.

The generated messages on plain gRPC: AsyncClient retries for 60 s, hides whether a write may have been made, and has
no listeners.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.cloud.firestore_v1.types import firestore as messages

from infra.clock import ServiceClock
from schemas.errors import AlreadyExists, Conflict, NotFound, PigeonError, Rejected, StoreUnavailable, TooLarge

T = TypeVar("T")
Message = Any
Connect = Callable[[], grpc.aio.Channel]
Metadata = Sequence[tuple[str, str]]

ATTEMPT_SECONDS = 5.0  # one try of a call
CALL_SECONDS = 10.0  # all tries of it; somebody waits for the answer
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds between tries, doubling
LISTENERS_PER_CHANNEL = 80  # Google's front end takes 100 streams on a connection; the next would wait for ever

SERVICE = "/google.firestore.v1.Firestore/"
CommitRequest, CommitResponse = messages.CommitRequest.pb(), messages.CommitResponse.pb()
ReadRequest, ReadResponse = messages.BatchGetDocumentsRequest.pb(), messages.BatchGetDocumentsResponse.pb()
QueryRequest, QueryResponse = messages.RunQueryRequest.pb(), messages.RunQueryResponse.pb()
ListenRequest, ListenResponse = messages.ListenRequest.pb(), messages.ListenResponse.pb()

Code = grpc.StatusCode
REFUSED = frozenset({Code.ABORTED, Code.RESOURCE_EXHAUSTED})  # nothing was written: worth another try
LOST = frozenset({Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.INTERNAL, Code.UNKNOWN, Code.CANCELLED})
"""No answer: a write may have been made, or may still be."""

SIZE = re.compile(r"maximum (entity )?size|maximum allowed size|larger than max|is longer than|too (large|big)")
FINAL: dict[grpc.StatusCode, type[PigeonError]] = {
    Code.ALREADY_EXISTS: AlreadyExists,
    Code.NOT_FOUND: NotFound,
    Code.FAILED_PRECONDITION: Conflict,
    Code.INVALID_ARGUMENT: Rejected,
    Code.OUT_OF_RANGE: Rejected,
}


class Calls:
    """The calls of one database, on channels of its own; `metadata` goes with each. `clock` is set by every commit."""

    def __init__(self, connect: Connect, metadata: Metadata, clock: ServiceClock) -> None:
        self._connect = connect
        self._clock = clock
        self._metadata = tuple(metadata)
        self._channel = connect()
        self._listening: dict[grpc.aio.Channel, int] = {}
        self.closed = False
        self._commit = self._channel.unary_unary(
            SERVICE + "Commit",
            request_serializer=CommitRequest.SerializeToString,
            response_deserializer=CommitResponse.FromString,
        )
        self._read = self._channel.unary_stream(
            SERVICE + "BatchGetDocuments",
            request_serializer=ReadRequest.SerializeToString,
            response_deserializer=ReadResponse.FromString,
        )
        self._query = self._channel.unary_stream(
            SERVICE + "RunQuery",
            request_serializer=QueryRequest.SerializeToString,
            response_deserializer=QueryResponse.FromString,
        )

    async def close(self) -> None:
        """End every call; later ones raise StoreUnavailable."""
        self.closed = True
        for channel in (self._channel, *self._listening):
            await channel.close()

    async def commit(self, request: Message, *, repeatable: bool) -> Message:
        """Write. `repeatable` says that the request's preconditions let it happen only once, so that a try without an
        answer is followed by another. If that one finds the precondition broken, it may have been by the try before:
        StoreUnavailable then, for nobody here knows.
        """

        async def attempt(seconds: float) -> Message:
            asked = self._clock.asked()
            response = await self._commit(request, metadata=self._metadata, timeout=seconds)
            if response.HasField("commit_time"):
                self._clock.told(response.commit_time.ToDatetime(tzinfo=UTC), asked)
            return response

        return await _persist(attempt, repeatable)

    async def read(self, request: Message) -> list[Message]:
        """BatchGetDocuments: the responses that tell of a document."""

        async def attempt(seconds: float) -> list[Message]:
            answers = self._read(request, metadata=self._metadata, timeout=seconds)
            return [answer async for answer in answers if received(answer).WhichOneof("result")]

        return await _persist(_reading(attempt), repeatable=True)

    async def query(self, request: Message, *, most_bytes: int | None = None) -> list[Message]:
        """RunQuery: the documents, and no more once they are over `most_bytes` together."""

        async def attempt(seconds: float) -> list[Message]:
            found: list[Message] = []
            size = 0
            answers = self._query(request, metadata=self._metadata, timeout=seconds)
            async for answer in answers:
                if received(answer).HasField("document"):
                    found.append(answer.document)
                    size += answer.ByteSize()
                if most_bytes is not None and size >= most_bytes:
                    answers.cancel()
                    break
            return found

        return await _persist(_reading(attempt), repeatable=True)

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[grpc.aio.StreamStreamCall]:
        """A Listen stream; ends with the context."""
        channel = self._room()
        self._listening[channel] += 1
        call = channel.stream_stream(
            SERVICE + "Listen",
            request_serializer=ListenRequest.SerializeToString,
            response_deserializer=ListenResponse.FromString,
        )(metadata=self._metadata)
        try:
            yield call
        finally:
            call.cancel()
            self._listening[channel] -= 1

    def _room(self) -> grpc.aio.Channel:
        for channel, count in self._listening.items():
            if count < LISTENERS_PER_CHANNEL:
                return channel
        channel = self._connect()
        self._listening[channel] = 0
        return channel


def _reading(attempt: Callable[[float], Awaitable[T]]) -> Callable[[float], Awaitable[T]]:
    """A read has no precondition: what looks like a broken one is a missing database or index."""

    async def reading(seconds: float) -> T:
        try:
            return await attempt(seconds)
        except grpc.aio.AioRpcError as error:
            if error.code() in (Code.NOT_FOUND, Code.FAILED_PRECONDITION):
                raise StoreUnavailable(_said(error)) from error
            raise

    return reading


async def _persist(attempt: Callable[[float], Awaitable[T]], repeatable: bool) -> T:
    """Try until there is an answer, or the time is over."""
    clock = asyncio.get_running_loop().time
    end = clock() + CALL_SECONDS
    pause = FIRST_PAUSE
    doubt = False
    while True:
        try:
            with translated(doubt=doubt):
                return await attempt(min(ATTEMPT_SECONDS, end - clock()))
        except StoreUnavailable as error:
            code = _code(error)
            doubt = doubt or code in LOST
            again = code in REFUSED or (code in LOST and repeatable)
            if not again or clock() + pause >= end:
                raise
        await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311
        pause = min(2 * pause, LONGEST_PAUSE)


def received(message: Message) -> Message:
    """The message. For one that cannot be decoded gRPC hands out None and goes on; raises what a lost answer raises."""
    if message is None:
        raise grpc.aio.AioRpcError(Code.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), "an answer is garbled")
    return message


def _code(error: StoreUnavailable) -> grpc.StatusCode | None:
    cause = error.__cause__
    return cause.code() if isinstance(cause, grpc.aio.AioRpcError) else None


@contextmanager
def translated(*, doubt: bool = False) -> Iterator[None]:
    """Raises our errors for gRPC's. With `doubt`, a write before this one got no answer and may be what stands in its
    way."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        kind = _kind(error)
        if doubt and kind in (AlreadyExists, Conflict, NotFound):
            raise StoreUnavailable(f"no answer came to a write that may have been made: {_said(error)}") from error
        raise kind(_said(error)) from error
    except (grpc.aio.UsageError, asyncio.InvalidStateError) as error:
        raise StoreUnavailable("the channel is closed") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise StoreUnavailable("the call was ended with its channel") from error  # gRPC says it like this


def _kind(error: grpc.aio.AioRpcError) -> type[PigeonError]:
    code = error.code()
    if code in (Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED) and SIZE.search(error.details() or ""):
        return TooLarge
    return FINAL.get(code, StoreUnavailable)


def _said(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {(error.details() or 'no details').strip()}"
