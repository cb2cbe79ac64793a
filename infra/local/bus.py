"""Topics and subscriptions in the SQLite file, with the promises of Pub/Sub."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from infra.local import queues
from infra.local.database import Database, translated
from infra.local.queues import SECOND, Lease, subscription_bell
from infra.local.subscriber import Subscriber
from infra.local.values import microseconds
from infra.local.writer import Write
from infra.messages import check_message
from schemas.errors import BusUnavailable, NotFound
from schemas.ports import Clock, Delivery, Message, Subscription
from schemas.topics import DEAD_LETTERS

T = TypeVar("T")


class LocalBus:
    """Implements schemas.ports.Bus on a Database.

    Every process that shares the file must be given the same subscriptions. The topic of dead letters is always
    there; a message that nothing subscribes to is dropped, as Pub/Sub drops it.
    """

    def __init__(
        self, database: Database, *, topics: Collection[str], subscriptions: Collection[Subscription], clock: Clock
    ) -> None:
        self._database = database
        self._topics = {*topics, DEAD_LETTERS}
        self._subscriptions = {subscription.name: subscription for subscription in subscriptions}
        self._clock = clock
        for subscription in subscriptions:
            if subscription.topic not in self._topics:
                raise ValueError(f"{subscription.name} subscribes to {subscription.topic!r}, which is no topic")

    async def publish(self, topic: str, message: Message) -> str:
        """See Bus.publish. A message with neither data nor attributes raises ValueError."""
        if topic not in self._topics:
            raise NotFound(f"there is no topic {topic!r}")
        check_message(message)
        operation = partial(queues.publish, topic=topic, message=message, subscriptions=self._of(topic), now=self.now())
        return str(await self.write(operation))

    @asynccontextmanager
    async def pull(self, subscription: Subscription) -> AsyncIterator[AsyncIterator[Delivery]]:
        """See Bus.pull. Raises NotFound for a subscription that the bus was not given.

        While the database cannot be written the subscriber waits and tries again; it raises BusUnavailable only once
        the database is closed. On leaving, what is held comes again at once, but for released deliveries.
        """
        if subscription.name not in self._subscriptions:
            raise NotFound(f"there is no subscription {subscription.name!r}")
        with self._database.bell(subscription_bell(subscription.name)) as bell:
            subscriber = Subscriber(self, subscription, bell)
            extending = asyncio.create_task(subscriber.extend_leases())
            try:
                yield subscriber
            finally:
                extending.cancel()
                await asyncio.wait([extending])
                await subscriber.leave()

    def now(self) -> int:
        """The clock's time in microseconds."""
        return microseconds(self._clock.now())

    async def sleep_until(self, moment: int) -> None:
        """Return when the clock shows this time (microseconds)."""
        await self._clock.sleep(max(0, moment - self.now()) / SECOND)

    async def write(self, operation: Callable[[Write], T]) -> T:
        """Run an operation in the database. Raises BusUnavailable."""
        with translated(BusUnavailable):
            return await self._database.write(operation)

    def submit_lease(self, subscription: Subscription, holder: int, limit: int) -> asyncio.Future[Lease]:
        """Start to take messages; the future goes on when its awaiter is cancelled."""
        dead_letters = self._of(DEAD_LETTERS)
        with translated(BusUnavailable):
            return self._database.submit(
                lambda write: queues.lease(write, subscription, holder, limit, self.now(), dead_letters)
            )

    @property
    def closed(self) -> bool:
        """Whether the database is closed, so that trying again is of no use."""
        return self._database.closed

    def _of(self, topic: str) -> list[Subscription]:
        return [subscription for subscription in self._subscriptions.values() if subscription.topic == topic]
