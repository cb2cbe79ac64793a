"""Listeners that tell less than happened. The emulator's miss what is committed while they start, and a server that is
busy may show several changes as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio

from infra.adapters.firestore import LISTENED, firestore_store
from schemas.documents import INDEXES
from tests.contracts.waiting import listening, soon

CHUNKS = "sessions/s1/chunks"

Shown = Callable[[list[str]], Awaitable[bool]]


class Selected(grpc.aio.StreamStreamClientInterceptor):  # type: ignore[misc]
    """Passes on only those states of a listener for which `shown`, given the ids of its documents, says so."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown

    async def intercept_stream_stream(self, continuation: Callable[..., Any], details: Any, requests: Any) -> Any:
        """Take the stream of states apart."""
        return self._select(await continuation(details, requests))

    async def _select(self, responses: AsyncIterator[Any]) -> AsyncIterator[Any]:
        state: list[Any] = []
        async for response in responses:
            if response is None:  # garbled: the listener is to start again
                yield response
                state = []
                continue
            state.append(response)
            change = response.target_change
            if response.HasField("target_change") and change.HasField("read_time") and not change.target_ids:
                names = [each.document_change.document.name for each in state if each.HasField("document_change")]
                if await self._shown([name.rpartition("/")[2] for name in names]):
                    for each in state:
                        yield each
                state = []


async def test_what_a_listener_missed_at_its_start_comes_at_once(firestore_host: str, project: str) -> None:
    """Nothing else is ever written, as after a command's last output: the reader does not wait for the next look."""
    states = 0

    async def only_the_first(ids: list[str]) -> bool:
        nonlocal states
        states += 1
        if states == 1:
            await writer.create(f"{CHUNKS}/0001", {})
        return states == 1

    async with (
        firestore_store(project, indexes=INDEXES, emulator=firestore_host) as writer,
        firestore_store(
            project, indexes=INDEXES, emulator=firestore_host, interceptors=[Selected(only_the_first)]
        ) as reader,
        listening(reader.follow(CHUNKS)) as batches,
    ):
        assert [snapshot.id for snapshot in await soon(anext(batches))] == ["0001"]
    assert states


async def test_what_a_watch_missed_at_its_start_comes_at_once(firestore_host: str, project: str) -> None:
    """A page that was opened just before its session was ready would have waited for it without end."""
    states = 0

    async def only_the_first(ids: list[str]) -> bool:
        nonlocal states
        states += 1
        if states == 1:
            await writer.update("sessions/s1", {"state": "ready"})
        return states == 1

    async with (
        firestore_store(project, indexes=INDEXES, emulator=firestore_host) as writer,
        firestore_store(
            project, indexes=INDEXES, emulator=firestore_host, interceptors=[Selected(only_the_first)]
        ) as reader,
    ):
        await writer.create("sessions/s1", {"state": "starting"})
        async with listening(reader.watch("sessions/s1")) as states_seen:
            seen = [await soon(anext(states_seen)) for _ in range(2)]
    assert [snapshot.data["state"] for snapshot in seen if snapshot is not None] == ["starting", "ready"]
    assert states


async def test_what_a_listener_skips_is_read(firestore_host: str, project: str) -> None:
    """Only the newest documents are shown, of many that came since the last state: all of them come, in order."""
    names = [f"{number:03}" for number in range(5 * LISTENED)]
    started = asyncio.Event()
    skipped = 0

    async def first_and_last(ids: list[str]) -> bool:
        nonlocal skipped
        passed = names[-1] in ids or not started.is_set()
        skipped += not passed
        started.set()
        return passed

    async with (
        firestore_store(project, indexes=INDEXES, emulator=firestore_host) as writer,
        firestore_store(
            project, indexes=INDEXES, emulator=firestore_host, interceptors=[Selected(first_and_last)]
        ) as reader,
        listening(reader.follow(CHUNKS, limit=3)) as batches,
    ):
        first = asyncio.ensure_future(anext(batches))
        await soon(started.wait())
        for name in names:
            await writer.create(f"{CHUNKS}/{name}", {})
        seen = [snapshot.id for snapshot in await soon(first)]
        while seen[-1] != names[-1]:
            seen += [snapshot.id for snapshot in await soon(anext(batches))]
    assert seen == names
    assert skipped
