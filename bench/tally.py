"""What is asked of Firestore and Pub/Sub, counted at the gRPC layer in the units that they bill."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

MIN_BILLED_BYTES = 1_000  # Pub/Sub, for each publish, pull or push request


@dataclass
class Tally:
    """Exact counts: nothing is sampled, and calls that were refused are counted apart."""

    writes: Counter[str] = field(default_factory=Counter)  # documents, by collection
    reads: Counter[str] = field(default_factory=Counter)  # documents, by the call that brought them
    messages: Counter[str] = field(default_factory=Counter)  # published, by topic
    pubsub_bytes: int = 0  # published and delivered, each request with at least MIN_BILLED_BYTES
    calls: Counter[str] = field(default_factory=Counter)  # answered ones, by method
    refused: Counter[str] = field(default_factory=Counter)  # calls that failed, by method

    def clear(self) -> None:
        """Start anew."""
        for counts in (self.writes, self.reads, self.messages, self.calls, self.refused):
            counts.clear()
        self.pubsub_bytes = 0

    def interceptors(self) -> list[grpc.aio.ClientInterceptor]:
        """For a channel whose calls are counted."""
        return [_Unary(self), _Streamed(self), _Listened(self)]

    def answered(self, method: str, request: Any, response: Any) -> None:
        """Count a call that succeeded."""
        self.calls[method] += 1
        if method == "Commit":
            self.writes.update(map(_collection, request.writes))
        elif method == "Publish":
            self.messages[request.topic.rpartition("/")[2]] += len(request.messages)
            self._bill(sum(map(_size, request.messages)))
        elif method == "Pull" and response.received_messages:
            self._bill(sum(_size(received.message) for received in response.received_messages))

    def _bill(self, size: int) -> None:
        self.pubsub_bytes += max(MIN_BILLED_BYTES, size)


def _collection(write: Any) -> str:
    """The collection of the document that is written; "checks" for a write that only carries a precondition."""
    if write.HasField("update_mask") and not write.update_mask.field_paths:
        return "checks"
    return str((write.update.name or write.delete).split("/")[-2])


def _size(message: Any) -> int:
    attributes = sum(len(name.encode()) + len(value.encode()) for name, value in message.attributes.items())
    return len(message.data) + attributes + len(message.ordering_key.encode())


def _method(details: Any) -> str:
    name = details.method.decode() if isinstance(details.method, bytes) else details.method
    return str(name.rpartition("/")[2])


class _Unary(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        """Count it once it is answered."""
        call = await continuation(details, request)
        try:
            response = await call
        except grpc.aio.AioRpcError:
            self._tally.refused[_method(details)] += 1
            raise
        self._tally.answered(_method(details), request, response)
        return call


class _Streamed(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc]
    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def intercept_unary_stream(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        """Count the documents that it brings."""
        return self._counted(await continuation(details, request), _method(details))

    async def _counted(self, responses: AsyncIterator[Any], method: str) -> AsyncIterator[Any]:
        brought = 0
        try:
            async for response in responses:
                if method == "BatchGetDocuments" or response.HasField("document"):
                    brought += bool(method == "RunQuery" or response.WhichOneof("result"))
                yield response
        finally:
            self._tally.calls[method] += 1
            self._tally.reads[method] += max(1, brought)  # a query without a result is billed as one read


class _Listened(grpc.aio.StreamStreamClientInterceptor):  # type: ignore[misc]
    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    async def intercept_stream_stream(self, continuation: Callable[..., Any], details: Any, requests: Any) -> Any:
        """Count each version of a document once for each stream, as the cloud sends and bills it: the emulator sends
        a query's whole result again with each change."""
        return self._counted(await continuation(details, requests), _method(details))

    async def _counted(self, responses: AsyncIterator[Any], method: str) -> AsyncIterator[Any]:
        self._tally.calls[method] += 1
        seen: set[tuple[str, int, int]] = set()
        async for response in responses:
            if response.HasField("document_change"):
                document = response.document_change.document
                version = (document.name, document.update_time.seconds, document.update_time.nanos)
                self._tally.reads[method] += version not in seen
                seen.add(version)
            yield response
