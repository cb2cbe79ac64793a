"""The subscribing side: unary pull, and leases that we extend ourselves."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime

from google.pubsub_v1.types import ReceivedMessage

from infra.adapters.pubsub_calls import Calls
from infra.adapters.pubsub_lane import Lane
from schemas.errors import BusUnavailable, PigeonError
from schemas.ports import Delivery, Message, Subscription

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

    def __init__(self, calls: Calls, subscription: Subscription) -> None:
        self._calls = calls
        self._subscription = subscription
        self._deadline = max(1, math.ceil(subscription.ack_deadline))  # Pub/Sub counts whole seconds
        self._held: dict[str, PubsubDelivery] = {}  # by message id: extended, and counted against max_outstanding
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
                await asyncio.sleep(pause)
                pause = min(2 * pause, PAUSE_MAX_SECONDS)
            except PigeonError as error:
                self._failure = error
                self._arrived.set()
                return
            else:
                pause = PAUSE_MIN_SECONDS
                self._accept_all(received)

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
        returned = [self._returns.submit(delivery.ack_id) for delivery in held]
        for delivery in held:
            self._drop(delivery)
            delivery.end()
        with suppress(BusUnavailable):
            await asyncio.gather(*returned)
        await self._acks.finish()

    async def settle(self, delivery: PubsubDelivery) -> None:
        """Acknowledge. Raises BusUnavailable; the lease is not extended any more then, so the message comes again."""
        if not delivery.leased:
            return  # another worker may hold it now
        try:
            await self._acks.submit(delivery.ack_id)
        except BusUnavailable:
            self.release(delivery)
            raise
        delivery.settle()
        self._drop(delivery)
        self._advance(delivery)

    async def give_back(self, delivery: PubsubDelivery) -> None:
        """Make the message due again, and those of its key behind it. Raises BusUnavailable, as `settle`."""
        if not delivery.leased:
            return
        behind = self._fall_out(delivery)
        self._drop(delivery)
        delivery.settle()
        returned = [self._returns.submit(one.ack_id) for one in (delivery, *behind)]
        await asyncio.gather(*returned)

    def release(self, delivery: PubsubDelivery) -> None:
        """Extend it no more, and make room for another."""
        if self._holds(delivery):
            self._return_line(delivery)
            self._drop(delivery)

    def lapse(self, delivery: PubsubDelivery) -> None:
        """Its lease is over."""
        self.release(delivery)
        delivery.end()

    def _holds(self, delivery: PubsubDelivery) -> bool:
        return self._held.get(delivery.message_id) is delivery

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
        known = self._held.get(delivery.message_id)
        if known is not None and not known.seen:  # its lease ended on the way; nobody has noticed
            known.renew(received.ack_id, self._deadline)
            return
        if known is not None:
            self.lapse(known)
        self._held[delivery.message_id] = delivery
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
            del self._held[delivery.message_id]
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


class PubsubDelivery:
    """Implements schemas.ports.Delivery. Moments are seconds of the event loop's clock."""

    def __init__(self, subscriber: Subscriber, received: ReceivedMessage, deadline: float, max_lease: float) -> None:
        raw = ReceivedMessage.pb(received)
        now = asyncio.get_running_loop().time()
        self.ack_id: str = raw.ack_id
        self.seen = False
        self.expires_at = now + deadline
        self._longest = now + max_lease
        self._subscriber = subscriber
        self._message = Message(raw.message.data, dict(raw.message.attributes), raw.message.ordering_key)
        self._message_id: str = raw.message.message_id
        self._attempt: int = max(1, raw.delivery_attempt)
        self._published_at: datetime = raw.message.publish_time.ToDatetime(tzinfo=UTC)
        self._over = asyncio.Event()
        self._alarm: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<delivery {self._attempt} of message {self._message_id}>"

    @property
    def message(self) -> Message:
        """See Delivery.message."""
        return self._message

    @property
    def message_id(self) -> str:
        """See Delivery.message_id."""
        return self._message_id

    @property
    def attempt(self) -> int:
        """See Delivery.attempt. It is 1 for ever where the subscription has no dead-letter policy."""
        return self._attempt

    @property
    def published_at(self) -> datetime:
        """See Delivery.published_at."""
        return self._published_at

    async def ack(self) -> None:
        """See Delivery.ack. Raises BusUnavailable."""
        await self._subscriber.settle(self)

    async def nack(self) -> None:
        """See Delivery.nack. Raises BusUnavailable."""
        await self._subscriber.give_back(self)

    def release(self) -> None:
        """See Delivery.release."""
        self._subscriber.release(self)

    async def lost(self) -> None:
        """See Delivery.lost."""
        await self._over.wait()

    @property
    def leased(self) -> bool:
        """Whether it may still be settled."""
        return self._alarm is not None and self.expires_at > asyncio.get_running_loop().time()

    def may_last(self, now: float, until: float) -> bool:
        """Whether its lease may be extended until then: what has lapsed is another's."""
        return self.expires_at > now and self._longest >= until

    def renew(self, ack_id: str, deadline: float) -> None:
        """It was delivered again before anybody saw it."""
        self.ack_id = ack_id
        self.expires_at = asyncio.get_running_loop().time() + deadline

    def watch(self) -> None:
        """Tell the subscriber when the lease is over."""
        self._alarm = asyncio.get_running_loop().call_at(self.expires_at, self._ring)

    def settle(self) -> None:
        """There is no lease any more, and none was lost."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def end(self) -> None:
        """The lease is lost."""
        self.settle()
        self._over.set()

    def _ring(self) -> None:
        if self.expires_at > asyncio.get_running_loop().time():
            self.watch()  # it was extended
        else:
            self._subscriber.lapse(self)
