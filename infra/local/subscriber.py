"""The subscribing side of the embedded bus: taking messages, and keeping their leases."""

from __future__ import annotations

import asyncio
import logging
import secrets
import sqlite3
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Protocol, TypeVar

from infra.local import queues
from infra.local.queues import SECOND, Lease, Leased
from infra.local.values import from_microseconds
from infra.local.writer import Write
from schemas.errors import BusUnavailable
from schemas.ports import Delivery, Message, Subscription

T = TypeVar("T")

logger = logging.getLogger(__name__)

LEASE_BATCH = 16  # messages taken at once, so that the other subscribers get some too
EXTENSIONS = 3  # in one ack deadline: two may fail before a lease is lost
UNAVAILABLE_PAUSE = SECOND // 4  # before a subscriber tries again, in microseconds


class Broker(Protocol):
    """What a subscriber needs of its bus."""

    @property
    def closed(self) -> bool:
        """Whether trying again is of no use."""

    def now(self) -> int:
        """The time in microseconds."""

    async def sleep_until(self, moment: int) -> None:
        """Return at that time."""

    async def write(self, operation: Callable[[Write], T]) -> T:
        """Commit an operation. Raises BusUnavailable."""

    def submit_lease(self, subscription: Subscription, holder: int, limit: int) -> asyncio.Future[Lease]:
        """Start to take messages. Raises BusUnavailable, the future sqlite3.Error."""


class Subscriber:
    """One open pull: an iterator of deliveries, for one task."""

    def __init__(self, bus: Broker, subscription: Subscription, bell: asyncio.Event) -> None:
        self._bus = bus
        self._subscription = subscription
        self._bell = bell
        self._holder = secrets.randbits(62)
        self._ready: deque[LocalDelivery] = deque()
        self._held: dict[int, LocalDelivery] = {}  # extended, and counted against max_outstanding
        self._released: set[LocalDelivery] = set()
        self._leasing: asyncio.Future[Lease] | None = None
        self._next_due: int | None = 0  # when something may become due (0: now); None: only the bell tells
        self._alarm: asyncio.Task[None] | None = None
        self._alarm_at = 0

    def __aiter__(self) -> Subscriber:
        return self

    async def __anext__(self) -> Delivery:
        """The next message, as soon as there is one and fewer than `max_outstanding` are held."""
        while True:
            while self._ready:
                delivery = self._ready.popleft()
                if self._holds(delivery):  # its lease may have ended while nobody asked for it
                    return delivery
            if self._leasing is None:  # else a cancelled call left its own behind
                await self._wait()
            await self._take()

    async def extend_leases(self) -> None:
        """Runs beside the iteration until cancelled: extends what is held, and tells whose lease is over."""
        period = self._ack_deadline // EXTENSIONS
        while True:
            ends = [delivery.deadline for delivery in (*self._held.values(), *self._released)]
            await self._bus.sleep_until(min([self._bus.now() + period, *ends]))
            await self._extend()
            for delivery in [*self._held.values(), *self._released]:
                if delivery.deadline <= self._bus.now():
                    self._lose(delivery)

    async def leave(self) -> None:
        """Give back what is held; where the database cannot be written it comes again at its deadline."""
        if self._alarm is not None:
            self._alarm.cancel()
            await asyncio.gather(self._alarm, return_exceptions=True)
        with suppress(sqlite3.Error, BusUnavailable):
            if self._leasing is not None:
                self._accept(await self._leasing)
            unseen = {delivery.lease for delivery in self._ready if self._holds(delivery)}
            seen = {delivery.lease for delivery in self._held.values()} - unseen
            if seen or unseen:
                await self._bus.write(lambda write: queues.take_back(write, self._subscription, seen, unseen))
        for delivery in [*self._held.values(), *self._released]:
            self._lose(delivery)

    async def settle(self, delivery: LocalDelivery) -> None:
        """Take the message out of the subscription, unless somebody else holds it by now."""
        await self._bus.write(lambda write: queues.settle(write, self._subscription, delivery.lease))
        self._drop(delivery)

    async def give_back(self, delivery: LocalDelivery) -> None:
        """Make the message due again after its back-off, unless somebody else holds it by now."""
        due = 0 if delivery.lease.ordering_key else self._bus.now() + self._back_off(delivery.attempt)
        await self._bus.write(lambda write: queues.give_back(write, self._subscription, delivery.lease, due))
        self._drop(delivery)

    def release(self, delivery: LocalDelivery) -> None:
        """Extend it no more, and make room for another."""
        if self._holds(delivery):
            self._drop(delivery)
            self._released.add(delivery)

    @property
    def _ack_deadline(self) -> int:
        return int(self._subscription.ack_deadline * SECOND)

    def _back_off(self, attempt: int) -> int:
        if self._subscription.ordered:
            return 0
        seconds = self._subscription.retry_min * 2.0 ** min(attempt - 1, 32)
        return int(min(seconds, self._subscription.retry_max) * SECOND)

    def _holds(self, delivery: LocalDelivery) -> bool:
        return self._held.get(delivery.lease.message) is delivery

    async def _take(self) -> None:
        """Lease as many as there is room for, and note when something may become due next."""
        room = min(self._subscription.max_outstanding - len(self._held), LEASE_BATCH)
        try:
            if self._leasing is None:  # rings since a cancelled call's lease still count
                self._bell.clear()
                if room <= 0:
                    self._next_due = None  # settling rings our own bell
                    return
                self._leasing = self._bus.submit_lease(self._subscription, self._holder, room)
            lease = await asyncio.shield(self._leasing)
        except (sqlite3.Error, BusUnavailable) as error:
            self._leasing = None
            if self._bus.closed:
                raise BusUnavailable("the bus is closed") from error
            logger.warning("%s: no messages can be taken now: %s", self._subscription.name, error)
            self._next_due = self._bus.now() + UNAVAILABLE_PAUSE
            return
        self._accept(lease)

    def _accept(self, lease: Lease) -> None:
        self._leasing = None
        self._next_due = lease.next_due
        longest = self._bus.now() + int(self._subscription.max_lease * SECOND)
        for leased in lease.messages:
            delivery = LocalDelivery(self, leased, lease.due, longest)
            self._held[leased.lease.message] = delivery
            self._ready.append(delivery)

    async def _wait(self) -> None:
        """Return when there may be something to take: every look is a commit."""
        if self._next_due is not None:
            if self._next_due <= self._bus.now():
                return
            self._ring_by(self._next_due)
        await self._bell.wait()

    def _ring_by(self, moment: int) -> None:
        """Ring the bell then at the latest. An alarm for an earlier moment stays: a task a message would cost more."""
        if self._alarm is not None and not self._alarm.done():
            if self._alarm_at <= moment:
                return
            self._alarm.cancel()
        self._alarm_at = moment
        self._alarm = asyncio.create_task(self._ring_at(moment))

    async def _ring_at(self, moment: int) -> None:
        await self._bus.sleep_until(moment)
        self._bell.set()

    async def _extend(self) -> None:
        due = self._bus.now() + self._ack_deadline
        attempts = {number: held.attempt for number, held in self._held.items() if held.longest >= due}
        if not attempts:
            return
        try:
            kept = await self._bus.write(
                lambda write: queues.extend(write, self._subscription, self._holder, attempts, due)
            )
        except BusUnavailable as error:
            logger.warning("%s: leases cannot be extended now: %s", self._subscription.name, error)
            return
        for number, attempt in attempts.items():
            delivery = self._held.get(number)
            if delivery is not None and delivery.attempt == attempt:
                delivery.deadline = due
                if number not in kept:
                    self._lose(delivery)

    def _drop(self, delivery: LocalDelivery) -> None:
        self._released.discard(delivery)
        if self._holds(delivery):
            if len(self._held) >= self._subscription.max_outstanding:
                self._bell.set()  # there is room for another
            del self._held[delivery.lease.message]

    def _lose(self, delivery: LocalDelivery) -> None:
        self._drop(delivery)
        delivery.end()


class LocalDelivery:
    """Implements schemas.ports.Delivery."""

    def __init__(self, subscriber: Subscriber, leased: Leased, deadline: int, longest: int) -> None:
        self.lease = leased.lease
        self.deadline = deadline
        self.longest = longest
        self._subscriber = subscriber
        self._leased = leased
        self._over = asyncio.Event()
        self._settled = False

    def __repr__(self) -> str:
        return f"LocalDelivery({self.message_id}, attempt {self.attempt})"

    @property
    def message(self) -> Message:
        """See Delivery.message."""
        return self._leased.message

    @property
    def message_id(self) -> str:
        """See Delivery.message_id."""
        return str(self.lease.message)

    @property
    def attempt(self) -> int:
        """See Delivery.attempt."""
        return self.lease.attempt

    @property
    def published_at(self) -> datetime:
        """See Delivery.published_at."""
        return from_microseconds(self._leased.published)

    async def ack(self) -> None:
        """See Delivery.ack. Raises BusUnavailable; it may be tried again then."""
        if not self._settled:
            await self._subscriber.settle(self)
            self._settled = True

    async def nack(self) -> None:
        """See Delivery.nack. Raises BusUnavailable; it may be tried again then."""
        if not self._settled:
            await self._subscriber.give_back(self)
            self._settled = True

    def release(self) -> None:
        """See Delivery.release."""
        if not self._settled:
            self._subscriber.release(self)

    async def lost(self) -> None:
        """See Delivery.lost. Never returns once the delivery is settled."""
        await self._over.wait()

    def end(self) -> None:
        """The lease is over: wake whoever waits for that."""
        self._over.set()
