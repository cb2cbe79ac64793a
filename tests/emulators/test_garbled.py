"""Answers that cannot be decoded: gRPC logs them and hands out None instead. The emulator sends some under load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, cast

import grpc.aio

from infra.adapters.firestore import firestore_store
from schemas.documents import INDEXES
from schemas.ports import Query


class Garbled:
    """Garbles the first document that a call brings, once it is told to."""

    def __init__(self) -> None:
        self.wanted = 0

    def interceptors(self) -> list[grpc.aio.ClientInterceptor]:
        """For streams of answers."""
        return [_Streamed(self), _Listened(self)]

    async def pass_on(self, responses: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The responses, but for those to be garbled."""
        async for response in responses:
            brings = any(name.startswith(("document", "found")) for name in (f.name for f, _ in response.ListFields()))
            garble = brings and self.wanted > 0
            self.wanted -= garble
            yield None if garble else response


class _Streamed(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc]
    def __init__(self, garbled: Garbled) -> None:
        self._garbled = garbled

    async def intercept_unary_stream(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        """Garble, or not."""
        return self._garbled.pass_on(await continuation(details, request))


class _Listened(grpc.aio.StreamStreamClientInterceptor):  # type: ignore[misc]
    def __init__(self, garbled: Garbled) -> None:
        self._garbled = garbled

    async def intercept_stream_stream(self, continuation: Callable[..., Any], details: Any, requests: Any) -> Any:
        """Garble, or not."""
        return self._garbled.pass_on(await continuation(details, requests))


async def test_a_garbled_answer_costs_a_reader_nothing(firestore_host: str, project: str) -> None:
    """A listener starts again at its cursor, and a read is tried again: every document comes, once and in order."""
    garbled = Garbled()
    async with firestore_store(
        project, indexes=INDEXES, emulator=firestore_host, interceptors=garbled.interceptors()
    ) as store:
        follower = cast("Any", store.follow("sessions/s/chunks"))
        async with aclosing(follower), asyncio.timeout(60):
            await store.create("sessions/s/chunks/0001", {"n": 1})
            assert [snapshot.id for snapshot in await anext(follower)] == ["0001"]
            following = asyncio.ensure_future(anext(follower))
            garbled.wanted = 1
            await store.create("sessions/s/chunks/0002", {"n": 2})
            assert [snapshot.id for snapshot in await following] == ["0002"]
        garbled.wanted = 1
        assert await store.get("sessions/s/chunks/0002") is not None
        garbled.wanted = 1
        assert len(await store.query(Query("sessions/s/chunks"))) == 2
        assert garbled.wanted == 0
