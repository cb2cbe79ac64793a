"""Waiting for the store without polling it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from typing import Any, TypeVar, cast

from starlette.requests import ClientDisconnect, Request

from schemas.ports import Clock

T = TypeVar("T")


def closing(iterator: AsyncIterator[T]) -> AbstractAsyncContextManager[AsyncIterator[T]]:
    """The iterator, closed on the way out: that is how a watch or a follow is stopped."""
    return cast("AbstractAsyncContextManager[AsyncIterator[T]]", aclosing(cast("AsyncGenerator[T]", iterator)))


async def first(iterator: AsyncIterator[T], accept: Callable[[T], bool]) -> T:
    """The first item that `accept` accepts; the iterator is closed then. For iterators without an end."""
    async with closing(iterator) as items:
        async for item in items:
            if accept(item):
                return item
    raise RuntimeError("an endless iterator has ended")


async def within(clock: Clock, seconds: float, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None if it takes longer than `seconds`; it is cancelled then."""
    task = asyncio.ensure_future(work)
    alarm = asyncio.ensure_future(clock.sleep(seconds))
    try:
        await asyncio.wait({task, alarm}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await cancel(task, alarm)


async def merge(*iterators: AsyncIterator[Any]) -> AsyncGenerator[tuple[int, Any], None]:
    """Items of several endless iterators as they come, each with the number of its iterator.

    Each iterator is asked for its next item only after its last one was taken: who is slow is not flooded. All of
    them are closed with this one.
    """
    async with AsyncExitStack() as stack:
        sources = [await stack.enter_async_context(closing(iterator)) for iterator in iterators]
        waiting = {asyncio.ensure_future(anext(source)): number for number, source in enumerate(sources)}
        try:
            while True:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    number = waiting.pop(task)
                    item = task.result()
                    waiting[asyncio.ensure_future(anext(sources[number]))] = number
                    yield number, item
        finally:
            await cancel(*waiting)


async def departure(request: Request) -> AsyncGenerator[None, None]:
    """Never an item: raises ClientDisconnect when the client goes away. The request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
    raise ClientDisconnect
    yield


async def ticks(clock: Clock, seconds: float) -> AsyncGenerator[None, None]:
    """One item every so many seconds."""
    while True:
        await clock.sleep(seconds)
        yield None


async def cancel(*tasks: asyncio.Future[T] | asyncio.Future[None]) -> None:
    """Cancel what is not done and wait until it is; failures of it are of no interest any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
