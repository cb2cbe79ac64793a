"""The subscribing side: unary pull, and leases that we extend ourselves."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from google.pubsub_v1.types import ReceivedMessage

from infra.adapters.pubsub_calls import Calls
from infra.adapters.pubsub_delivery import Identity, PubsubDelivery
from infra.adapters.pubsub_lane import Lane
from schemas.errors import BusUnavailable, NotFound, PigeonError
from schemas.ports import Delivery, Subscription

EXTENSIONS = 3  # in one ack deadline: two may fail before a lease is lost
MAX_PULLED = 1_000  # messages of one pull
MAX_ACK_IDS = 1_000  # of one request; Pub/Sub takes 512 KiB of them
PAUSE_MIN_SECONDS, PAUSE_MAX_SECONDS = 0.1, 2.0  # after a pull that failed
GIVE_BACK_SECONDS = 5.0

log = logging.getLogger(__name__)


class Subscriber:
    """One open pull: an iterator of deliveries, for one task.

    Pub/Sub hands over several messages of a key at once; they wait here in line, and only the first is delivered.
    When the first comes again, those behind it do too: they are given back with it, in order.
    """

    def __init__(
        self, calls: Calls, subscription: Subscription, remake: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._calls = calls
        self._subscription = subscription
        self._remake = remake  # the subscription, where that is for us to do
        self._known = remake is not None  # that it was there before
        self._deadline = max(1, math.ceil(subscription.ack_deadline))  # Pub/Sub counts whole seconds
        self._held: dict[Identity, PubsubDelivery] = {}  # extended, and counted against max_outstanding
        self._lines: dict[str, deque[PubsubDelivery]] = {}  # by ordering key; the first is ready or delivered
        self._ready: deque[PubsubDelivery] = deque()
        self._arrived = asyncio.Event()
        self._wanted = asyncio.Event()
        self._room = asyncio.Event()
        self._failure: PigeonError | None = None
        self._acks: Lane[str, None] = Lane(self._acknowledge, max_items=MAX_ACK_IDS)
        self._returns: Lane[str, None] = Lane(self._give_back, max_items=MAX_ACK_IDS)

    def __aiter__(self) -> Subscriber:
        return self

    async def __anext__(self) -> Delivery:
        """The next message. Raises NotFound where the subscription does not exist (any more)."""
        while True:
            while self._ready:
                delivery = self._ready.popleft()
                if self._holds(delivery):  # its lease may have ended while nobody asked for it
                    delivery.seen = True
                    return delivery
            if self._failure is not None:
                raise self._failure
            self._wanted.set()
            self._arrived.clear()
            await self._arrived.wait()

    async def pull_messages(self) -> None:
        """Runs beside the iteration until cancelled: keeps one pull open while somebody waits and there is room.

        A subscriber that nobody asks takes nothing: a message is better off with one that has time for it.
        """
        pause = PAUSE_MIN_SECONDS
        while True:
            await self._wanted.wait()
            room = await self._room_for()
            try:
                received = await self._calls.pull(self._subscription.name, min(room, MAX_PULLED))
            except BusUnavailable as error:
                log.warning("%s: no messages can be pulled now: %s", self._subscription.name, error)
            except NotFound as error:
                if not self._known:
                    self._failure = error
                    self._arrived.set()
                    return
                await self._vanished()
            else:
                self._known = True
                pause = PAUSE_MIN_SECONDS
                self._accept_all(received)
                continue
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSE_MAX_SECONDS)

    async def _vanished(self) -> None:
        """The subscription is gone, and its messages with it: those that are held here nobody else will be given. So
        they are handled to the end, and there is nothing to settle."""
        log.error("%s: the subscription is gone; messages come again when it is there", self._subscription.name)
        for delivery in self._held.values():
            delivery.orphan()
        if self._remake is not None:
            with suppress(BusUnavailable):
                await self._remake()

    async def extend_leases(self) -> None:
        """Runs beside the iteration until cancelled: extends what is held."""
        while True:
            await asyncio.sleep(self._deadline / EXTENSIONS)
            leases = list(self._held.values())
            for start in range(0, len(leases), MAX_ACK_IDS):
                await self._extend(leases[start : start + MAX_ACK_IDS])

    async def leave(self) -> None:
        """Give back what is held; where Pub/Sub does not answer it comes again at its deadline."""
        held = list(self._held.values())
        returned = [self._returns.submit(delivery.ack_id) for delivery in held if not delivery.orphaned]
        for delivery in held:
            self._drop(delivery)
            delivery.end()
        with suppress(BusUnavailable, NotFound):
            await asyncio.gather(*returned)
        await self._acks.finish()

    async def settle(self, delivery: PubsubDelivery) -> None:
        """Acknowledge. Raises BusUnavailable or NotFound; the lease is not extended any more then, so that the message
        comes again."""
        if delivery.leased:
            try:
                await self._acks.submit(delivery.ack_id)
            except PigeonError:
                self.release(delivery)
                raise
        elif not delivery.orphaned:
            return  # another worker may hold it now
        self._finish(delivery)

    async def give_back(self, delivery: PubsubDelivery) -> None:
        """Make the message due again, and those of its key behind it. Raises as `settle` does."""
        if delivery.orphaned:
            self._finish(delivery)
        if not delivery.leased:
            return
        behind = self._fall_out(delivery)
        self._drop(delivery)
        delivery.settle()
        returned = [self._returns.submit(one.ack_id) for one in (delivery, *behind)]
        await asyncio.gather(*returned)

    def release(self, delivery: PubsubDelivery) -> None:
        """Extend it no more, and make room for another."""
        if delivery.orphaned:
            self._finish(delivery)
        elif self._holds(delivery):
            self._return_line(delivery)
            self._drop(delivery)

    def _finish(self, delivery: PubsubDelivery) -> None:
        """It is done with: the next of its key is ready."""
        delivery.settle()
        self._drop(delivery)
        self._advance(delivery)

    def lapse(self, delivery: PubsubDelivery) -> None:
        """Its lease is over."""
        self.release(delivery)
        delivery.end()

    def _holds(self, delivery: PubsubDelivery) -> bool:
        return self._held.get(delivery.identity) is delivery

    async def _room_for(self) -> int:
        """How many more may be held, once that is more than none."""
        while (room := self._subscription.max_outstanding - len(self._held)) <= 0:
            self._room.clear()
            await self._room.wait()
        return room

    def _accept_all(self, received: Sequence[ReceivedMessage]) -> None:
        for message in received:
            self._accept(message)
        if self._ready:
            self._wanted.clear()

    def _accept(self, received: ReceivedMessage) -> None:
        delivery = PubsubDelivery(self, received, self._deadline, self._subscription.max_lease)
        known = self._held.get(delivery.identity)
        if known is not None and not known.seen:  # its lease ended on the way; nobody has noticed
            known.renew(received.ack_id, self._deadline)
            return
        if known is not None:
            self.lapse(known)
        self._held[delivery.identity] = delivery
        delivery.watch()
        key = delivery.message.ordering_key
        if self._subscription.ordered and key:
            line = self._lines.setdefault(key, deque())
            line.append(delivery)
            if line[0] is not delivery:
                return
        self._make_ready(delivery)

    def _make_ready(self, delivery: PubsubDelivery) -> None:
        self._ready.append(delivery)
        self._arrived.set()

    def _advance(self, delivery: PubsubDelivery) -> None:
        """The next of its key is ready."""
        line = self._lines.get(delivery.message.ordering_key)
        if line is None or line[0] is not delivery:
            return
        line.popleft()
        if line:
            self._make_ready(line[0])
        else:
            del self._lines[delivery.message.ordering_key]

    def _fall_out(self, delivery: PubsubDelivery) -> list[PubsubDelivery]:
        """Dissolve the line from this delivery on; returns those behind it, which nobody has seen."""
        line = self._lines.get(delivery.message.ordering_key)
        if line is None or delivery not in line:
            return []
        place = line.index(delivery)
        behind = list(line)[place + 1 :]
        for one in behind:
            self._drop(one)
            one.settle()
        while len(line) > place:
            line.pop()
        if not line:
            del self._lines[delivery.message.ordering_key]
        return behind

    def _return_line(self, delivery: PubsubDelivery) -> None:
        for one in self._fall_out(delivery):
            self._returns.submit(one.ack_id)

    def _drop(self, delivery: PubsubDelivery) -> None:
        if self._holds(delivery):
            del self._held[delivery.identity]
            self._room.set()

    async def _extend(self, deliveries: Sequence[PubsubDelivery]) -> None:
        now = asyncio.get_running_loop().time()
        kept = [one for one in deliveries if self._holds(one) and one.may_last(now, now + self._deadline)]
        if not kept:
            return
        ack_ids = [one.ack_id for one in kept]
        try:
            within = self._deadline / EXTENSIONS
            await self._calls.extend(self._subscription.name, ack_ids, self._deadline, within=within)
        except PigeonError as error:
            log.warning("%s: leases cannot be extended now: %s", self._subscription.name, error)
            return
        for one, ack_id in zip(kept, ack_ids, strict=True):
            if one.ack_id == ack_id:
                one.expires_at = now + self._deadline

    async def _acknowledge(self, ack_ids: list[str]) -> list[None]:
        await self._calls.acknowledge(self._subscription.name, ack_ids)
        return [None] * len(ack_ids)

    async def _give_back(self, ack_ids: list[str]) -> list[None]:
        await self._calls.extend(self._subscription.name, ack_ids, 0, within=GIVE_BACK_SECONDS)
        return [None] * len(ack_ids)
