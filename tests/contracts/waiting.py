"""Reading endless iterators in tests, with a limit on the patience."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE = 20.0  # seconds; only a failing test waits that long


async def soon(awaitable: Awaitable[T], timeout: float = PATIENCE) -> T:
    """The result, or TimeoutError."""
    async with asyncio.timeout(timeout):
        return await awaitable


async def take(items: AsyncIterator[T], count: int) -> list[T]:
    """The next items of an endless iterator."""
    return [await soon(anext(items)) for _ in range(count)]


@asynccontextmanager
async def listening(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Closes an endless iterator on the way out."""
    try:
        yield items
    finally:
        generator: Any = items
        await generator.aclose()
