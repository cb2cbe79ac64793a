"""One delivery of one message, and the lease that it is held by."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Protocol

from google.pubsub_v1.types import ReceivedMessage

from schemas.ports import Message

Identity = tuple[str, datetime]  # of a message: an emulator that was started again counts its ids anew


class Holder(Protocol):
    """Where deliveries are held: a subscriber."""

    async def settle(self, delivery: PubsubDelivery) -> None:
        """Acknowledge."""

    async def give_back(self, delivery: PubsubDelivery) -> None:
        """Make it due again."""

    def release(self, delivery: PubsubDelivery) -> None:
        """Extend it no more."""

    def lapse(self, delivery: PubsubDelivery) -> None:
        """Its lease is over."""


class PubsubDelivery:
    """Implements schemas.ports.Delivery; `attempt` is 1 for ever where the subscription has no dead-letter policy.

    Moments are seconds of the event loop's clock.
    """

    def __init__(self, holder: Holder, received: ReceivedMessage, deadline: float, max_lease: float) -> None:
        raw = ReceivedMessage.pb(received)
        now = asyncio.get_running_loop().time()
        self.message = Message(raw.message.data, dict(raw.message.attributes), raw.message.ordering_key)
        self.message_id: str = raw.message.message_id
        self.attempt: int = max(1, raw.delivery_attempt)
        self.published_at: datetime = raw.message.publish_time.ToDatetime(tzinfo=UTC)
        self.identity: Identity = (self.message_id, self.published_at)
        self.ack_id: str = raw.ack_id
        self.seen = False
        self.orphaned = False
        self.expires_at = now + deadline
        self._longest = now + max_lease
        self._holder = holder
        self._over = asyncio.Event()
        self._alarm: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<delivery {self.attempt} of message {self.message_id}>"

    async def ack(self) -> None:
        """See Delivery.ack. Raises BusUnavailable."""
        await self._holder.settle(self)

    async def nack(self) -> None:
        """See Delivery.nack. Raises BusUnavailable."""
        await self._holder.give_back(self)

    def release(self) -> None:
        """See Delivery.release."""
        self._holder.release(self)

    async def lost(self) -> None:
        """See Delivery.lost."""
        await self._over.wait()

    @property
    def leased(self) -> bool:
        """Whether it may still be settled."""
        return self._alarm is not None and self.expires_at > asyncio.get_running_loop().time()

    def may_last(self, now: float, until: float) -> bool:
        """Whether its lease may be extended until then: what has lapsed is another's."""
        return not self.orphaned and self.expires_at > now and self._longest >= until

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

    def orphan(self) -> None:
        """Nobody can settle it any more, and nobody else will be given it: it has no lease that could be lost."""
        self.orphaned = True
        self.settle()

    def end(self) -> None:
        """The lease is lost."""
        self.settle()
        self._over.set()

    def _ring(self) -> None:
        if self.expires_at > asyncio.get_running_loop().time():
            self.watch()  # it was extended
        else:
            self._holder.lapse(self)
