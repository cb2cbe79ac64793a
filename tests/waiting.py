"""Waiting for a condition, with a bound: the one place in the tests that polls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
LOOK_SECONDS = 0.02


async def until(look: Callable[[], Awaitable[T | None]], what: str, patience: float = 30.0) -> T:
    """Look again and again until `look` returns something true; fails with `what` after `patience` seconds."""
    try:
        async with asyncio.timeout(patience):
            while not (found := await look()):  # noqa: ASYNC110 - what is waited for lives in other processes
                await asyncio.sleep(LOOK_SECONDS)
    except TimeoutError:
        raise AssertionError(f"waited {patience:g} s in vain until {what}") from None
    return found
