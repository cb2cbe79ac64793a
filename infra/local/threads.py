"""Threads that work for one event loop."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Job(Generic[S, T]):
    """An operation on what a thread owns, and the future of its result."""

    operation: Callable[[S], T]
    future: asyncio.Future[T]


def settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    """Complete a future whose awaiter may have gone away. For the event loop."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


class Worker(ABC):
    """A thread whose end can be awaited. It is started by `start`, on the event loop, and told to end by a subclass."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def close(self) -> None:
        """Wait for the end of the thread."""
        await asyncio.shield(self._ended)
        self._thread.join()

    @abstractmethod
    def run(self) -> None:
        """What the thread does, until it is told to end."""

    def _work(self) -> None:
        try:
            self.run()
        finally:
            self._loop.call_soon_threadsafe(self._ended.set_result, None)
