"""One request in flight; what is submitted meanwhile is the next request's batch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Lane(Generic[T, R]):
    """Sends items in the order of their submission. Nothing waits for a timer, so one item alone goes at once, and
    the busier the lane is the larger are its batches.

    When a request fails, what waits behind it fails with it: no item overtakes an earlier one that its submitter is
    going to submit again.
    """

    def __init__(
        self,
        send: Callable[[list[T]], Awaitable[Sequence[R]]],
        *,
        max_items: int,
        weigh: Callable[[T], int] = lambda _: 1,
        max_weight: int = 1_000_000_000,
    ) -> None:
        self._send = send
        self._max_items = max_items
        self._weigh = weigh
        self._max_weight = max_weight
        self._waiting: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._sending: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight or waits."""
        return self._sending is None

    def submit(self, item: T) -> asyncio.Future[R]:
        """The future result. An item whose future is cancelled before its turn is not sent."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_looked_at)
        self._waiting.append((item, future))
        if self._sending is None:
            self._sending = asyncio.create_task(self._run())
        return future

    async def finish(self) -> None:
        """Return when everything submitted so far has its result."""
        if self._sending is not None:
            await asyncio.wait([self._sending])

    async def _run(self) -> None:
        try:
            while batch := self._batch():
                results = await self._send([item for item, _ in batch])
                for (_, future), result in zip(batch, results, strict=True):
                    if not future.done():
                        future.set_result(result)
                batch = []
        except BaseException as error:
            for _, future in (*batch, *self._waiting):
                if not future.done():
                    _fail(future, error)
            self._waiting.clear()
            if not isinstance(error, Exception):
                raise
        finally:
            self._sending = None

    def _batch(self) -> list[tuple[T, asyncio.Future[R]]]:
        batch: list[tuple[T, asyncio.Future[R]]] = []
        weight = 0
        while self._waiting and len(batch) < self._max_items:
            item, future = self._waiting[0]
            weight += self._weigh(item)
            if batch and weight > self._max_weight:
                break
            self._waiting.popleft()
            if not future.done():
                batch.append((item, future))
        return batch


def _fail(future: asyncio.Future[R], error: BaseException) -> None:
    if isinstance(error, Exception):
        future.set_exception(error)
    else:
        future.cancel()


def _looked_at(future: asyncio.Future[R]) -> None:
    """Who does not wait for the result does not want its error either."""
    if not future.cancelled():
        future.exception()
