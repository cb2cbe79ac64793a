"""What every Bus promises, whatever it is made of.

A test module inherits the class and gives two fixtures: `policy`, a maker of subscriptions in which times are as short
as the bus allows, and `connect`, which makes the topics and subscriptions and returns clients of one bus.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Protocol

import pytest

from schemas.errors import NotFound, TooLarge
from schemas.limits import MAX_ATTRIBUTE_BYTES, MAX_MESSAGE_BYTES
from schemas.ports import Bus, Delivery, Message, Subscription
from schemas.topics import DEAD_LETTERS
from tests.contracts.waiting import soon, take

TOPIC = "happenings"


class Policy(Protocol):
    """Makes a subscription to TOPIC."""

    def __call__(
        self,
        name: str = "reader",
        *,
        topic: str = TOPIC,
        ordered: bool = False,
        max_lease: float = 600.0,
        max_outstanding: int = 100,
        max_attempts: int = 20,
    ) -> Subscription:
        """Deadlines and back-offs are the shortest that the bus allows."""


Connect = Callable[[Sequence[Subscription]], Awaitable[tuple[Bus, Bus]]]


def text(delivery: Delivery) -> str:
    """What the message says."""
    return delivery.message.data.decode()


async def publish(bus: Bus, *texts: str, key: str = "") -> list[str]:
    """Publish messages one after another; returns their ids."""
    return [await bus.publish(TOPIC, Message(data.encode(), ordering_key=key)) for data in texts]


async def read_and_ack(deliveries: AsyncIterator[Delivery], count: int) -> list[str]:
    """The next messages, each acked before the next is asked for."""
    texts = []
    for _ in range(count):
        delivery = await soon(anext(deliveries))
        await delivery.ack()
        texts.append(text(delivery))
    return texts


async def stays_silent(deliveries: AsyncIterator[Delivery], seconds: float) -> None:
    """Nothing is delivered for that long; the iterator goes on afterwards."""
    with pytest.raises(TimeoutError):
        await soon(anext(deliveries), seconds)


class BusContract:
    """Publishing, leases, ordering and dead letters."""

    async def test_a_message_arrives_as_it_was_published(self, policy: Policy, connect: Connect) -> None:
        """Bytes, attributes, key and id are the same; it is the first attempt."""
        reader = policy()
        bus, peer = await connect([reader])
        sent = Message(bytes(range(256)), {"ce-type": "x", "ünï": "cödé", "empty": ""}, "key")
        before = datetime.now(UTC) - timedelta(seconds=1)
        message_id = await peer.publish(TOPIC, sent)
        async with bus.pull(reader) as deliveries:
            delivery = await soon(anext(deliveries))
            assert (delivery.message, delivery.message_id, delivery.attempt) == (sent, message_id, 1)
            assert before < delivery.published_at < datetime.now(UTC) + timedelta(seconds=1)
            await delivery.ack()

    async def test_a_waiting_subscriber_is_woken(self, policy: Policy, connect: Connect) -> None:
        """A message that another client publishes arrives without being polled for."""
        reader = policy()
        bus, peer = await connect([reader])
        async with bus.pull(reader) as deliveries:
            for number in range(5):
                waiting = asyncio.ensure_future(soon(anext(deliveries)))
                await asyncio.sleep(0)
                await publish(peer, str(number))
                delivery = await waiting
                assert text(delivery) == str(number)
                await delivery.ack()

    async def test_an_acked_message_does_not_come_again(self, policy: Policy, connect: Connect) -> None:
        """Nor after its deadline, nor to another subscriber."""
        reader = policy()
        bus, peer = await connect([reader])
        await publish(bus, "one", "two")
        async with bus.pull(reader) as deliveries:
            assert sorted(await read_and_ack(deliveries, 2)) == ["one", "two"]
        async with peer.pull(reader) as deliveries:
            await stays_silent(deliveries, reader.ack_deadline * 1.5)

    async def test_every_subscription_gets_every_message(self, policy: Policy, connect: Connect) -> None:
        """One message, two subscriptions, two acks."""
        left, right = policy("left"), policy("right", ordered=True)
        bus, _ = await connect([left, right])
        await publish(bus, "a", "b", key="k")
        for subscription in (left, right):
            async with bus.pull(subscription) as deliveries:
                assert sorted(await read_and_ack(deliveries, 2)) == ["a", "b"]

    async def test_subscribers_share_the_messages(self, policy: Policy, connect: Connect) -> None:
        """Each message goes to one of them."""
        reader = policy(max_outstanding=5)
        bus, peer = await connect([reader])
        await publish(bus, *"abcdefghij")
        async with bus.pull(reader) as left, peer.pull(reader) as right:
            held = await take(left, 5) + await take(right, 5)
            assert sorted(map(text, held)) == list("abcdefghij")
            for delivery in held:
                await delivery.ack()

    async def test_an_unknown_topic_is_not_found(self, policy: Policy, connect: Connect) -> None:
        """Publishing creates no topics."""
        bus, _ = await connect([policy()])
        with pytest.raises(NotFound):
            await bus.publish("no-such-topic", Message(b"x"))

    async def test_limits_of_a_message(self, policy: Policy, connect: Connect) -> None:
        """What is too large is refused; what just fits arrives."""
        reader = policy()
        bus, _ = await connect([reader])
        for message in (
            Message(bytes(MAX_MESSAGE_BYTES + 1)),
            Message(b"x", {"name": "v" * (MAX_ATTRIBUTE_BYTES + 1)}),
            Message(b"x", {"n" * 257: "value"}),
            Message(b"x", {str(number): "" for number in range(101)}),
            Message(b"x", {}, "k" * 1_025),
        ):
            with pytest.raises(TooLarge):
                await bus.publish(TOPIC, message)
        fits = Message(bytes(1_000_000), {"name": "v" * MAX_ATTRIBUTE_BYTES}, "k" * 1_024)
        await bus.publish(TOPIC, fits)
        async with bus.pull(reader) as deliveries:
            delivery = await soon(anext(deliveries))
            assert delivery.message == fits
            await delivery.ack()

    async def test_a_held_message_stays_with_its_holder(self, policy: Policy, connect: Connect) -> None:
        """The lease is extended for as long as nobody settles it."""
        reader = policy()
        bus, peer = await connect([reader])
        await publish(bus, "held")
        async with bus.pull(reader) as deliveries, peer.pull(reader) as others:
            delivery = await soon(anext(deliveries))
            lost = asyncio.ensure_future(delivery.lost())
            await stays_silent(others, reader.ack_deadline * 2.5)
            assert not lost.done()
            await delivery.ack()
            lost.cancel()

    async def test_a_released_message_comes_again(self, policy: Policy, connect: Connect) -> None:
        """After its deadline, to anybody, as the next attempt at the same message; the holder is told."""
        reader = policy()
        bus, peer = await connect([reader])
        (message_id,) = await publish(bus, "again")
        async with bus.pull(reader) as deliveries, peer.pull(reader) as others:
            delivery = await soon(anext(deliveries))
            delivery.release()
            again = await soon(anext(others))
            assert (text(again), again.message_id, again.attempt) == ("again", message_id, 2)
            await soon(delivery.lost())
            await again.ack()

    async def test_a_lease_ends_at_its_longest(self, policy: Policy, connect: Connect) -> None:
        """`max_lease` ends the extension, and `lost` returns."""
        short = policy()
        reader = policy(max_lease=short.ack_deadline * 1.5)
        bus, peer = await connect([reader])
        await publish(bus, "long work")
        async with bus.pull(reader) as deliveries, peer.pull(reader) as others:
            delivery = await soon(anext(deliveries))
            await soon(delivery.lost())
            again = await soon(anext(others))
            assert again.attempt == 2
            await again.ack()

    async def test_a_stale_ack_changes_nothing(self, policy: Policy, connect: Connect) -> None:
        """Who lost the lease cannot settle the message that another holds now."""
        reader = policy()
        bus, peer = await connect([reader])
        await publish(bus, "contested")
        async with bus.pull(reader) as deliveries, peer.pull(reader) as others:
            stale = await soon(anext(deliveries))
            stale.release()
            held = await soon(anext(others))
            await stale.ack()
            await held.nack()
            last = await soon(anext(others))
            assert last.attempt == 3
            await last.ack()

    async def test_a_nack_gives_the_message_back(self, policy: Policy, connect: Connect) -> None:
        """It comes again, as the next attempt."""
        reader = policy()
        bus, _ = await connect([reader])
        await publish(bus, "later")
        async with bus.pull(reader) as deliveries:
            for attempt in (1, 2, 3):
                delivery = await soon(anext(deliveries))
                assert delivery.attempt == attempt
                await delivery.nack()

    async def test_leaving_gives_the_messages_back(self, policy: Policy, connect: Connect) -> None:
        """What a subscriber held when it left is delivered to the next one."""
        reader = policy()
        bus, peer = await connect([reader])
        await publish(bus, *"abc")
        async with bus.pull(reader) as deliveries:
            await take(deliveries, 2)
        async with peer.pull(reader) as others:
            assert sorted(await read_and_ack(others, 3)) == ["a", "b", "c"]

    async def test_flow_control(self, policy: Policy, connect: Connect) -> None:
        """No more than `max_outstanding` are held; settling one makes room for one."""
        reader = policy(max_outstanding=3)
        bus, _ = await connect([reader])
        await publish(bus, *"abcdef")
        async with bus.pull(reader) as deliveries:
            held = await take(deliveries, 3)
            await stays_silent(deliveries, reader.ack_deadline * 0.5)
            await held[0].ack()
            held += await take(deliveries, 1)
            await stays_silent(deliveries, reader.ack_deadline * 0.5)
            for delivery in held[1:]:
                await delivery.ack()
            assert len(await read_and_ack(deliveries, 2)) == 2

    async def test_a_keys_messages_come_in_order(self, policy: Policy, connect: Connect) -> None:
        """Whoever takes them, and however many keys there are."""
        reader = policy(ordered=True)
        bus, peer = await connect([reader])
        for number in range(10):
            for key in "ab":
                await publish(bus if number % 2 else peer, f"{key}{number}", key=key)
        seen: list[str] = []

        async def work(client: Bus) -> None:
            async with client.pull(reader) as deliveries:
                while len(seen) < 20:
                    delivery = await anext(deliveries)
                    seen.append(text(delivery))
                    await delivery.ack()

        workers = [asyncio.ensure_future(work(client)) for client in (bus, peer)]
        await soon(asyncio.wait(workers, return_when=asyncio.FIRST_COMPLETED))
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        for key in "ab":
            assert [one for one in seen if one[0] == key] == [f"{key}{number}" for number in range(10)]

    async def test_the_next_of_a_key_waits_for_the_ack(self, policy: Policy, connect: Connect) -> None:
        """Also for another subscriber; other keys do not wait."""
        reader = policy(ordered=True)
        bus, peer = await connect([reader])
        await publish(bus, "a1", "a2", key="a")
        async with peer.pull(reader) as others:
            async with bus.pull(reader) as deliveries:
                first = await soon(anext(deliveries))
                await publish(bus, "b1", key="b")
                assert await read_and_ack(others, 1) == ["b1"]
                await stays_silent(others, reader.ack_deadline * 0.5)
                await first.ack()
            assert await read_and_ack(others, 1) == ["a2"]

    async def test_a_redelivered_message_is_followed_by_its_successors(self, policy: Policy, connect: Connect) -> None:
        """A nack and a lost lease change nothing in the order."""
        reader = policy(ordered=True)
        bus, peer = await connect([reader])
        await publish(bus, "1", "2", "3", key="k")
        async with bus.pull(reader) as deliveries:
            await (await soon(anext(deliveries))).nack()
            again = await soon(anext(deliveries))
            assert (text(again), again.attempt) == ("1", 2)
            await again.ack()
            lapsed = await soon(anext(deliveries))
            assert text(lapsed) == "2"
            lapsed.release()
            await soon(lapsed.lost())
        async with peer.pull(reader) as others:
            assert await read_and_ack(others, 2) == ["2", "3"]

    async def test_messages_without_a_key_are_not_ordered(self, policy: Policy, connect: Connect) -> None:
        """In an ordered subscription too: one that is held holds up none of the others."""
        reader = policy(ordered=True)
        bus, _ = await connect([reader])
        await publish(bus, "1", "2")
        async with bus.pull(reader) as deliveries:
            held = await take(deliveries, 2)
            assert sorted(map(text, held)) == ["1", "2"]
            for delivery in held:
                await delivery.ack()

    async def test_a_busy_key_does_not_starve_a_quiet_one(self, policy: Policy, connect: Connect) -> None:
        """A message of a quiet session is not behind all those of a busy one."""
        reader = policy(ordered=True, max_outstanding=1)
        bus, _ = await connect([reader])
        await publish(bus, *(f"busy {number}" for number in range(50)), key="busy")
        await publish(bus, "quiet", key="quiet")
        async with bus.pull(reader) as deliveries:
            assert "quiet" in await read_and_ack(deliveries, 10)

    async def test_hopeless_messages_become_dead_letters(self, policy: Policy, connect: Connect) -> None:
        """After `max_attempts` the message moves to the dead letters, with its bytes and a note of its origin, and
        the next message of its key follows."""
        reader, undertaker = policy(ordered=True, max_attempts=5), policy("undertaker", topic=DEAD_LETTERS)
        bus, _ = await connect([reader, undertaker])
        await bus.publish(TOPIC, Message(b"poison", {"ce-type": "x"}, "k"))
        await publish(bus, "healthy", key="k")
        async with bus.pull(reader) as deliveries, bus.pull(undertaker) as dead:
            for attempt in range(1, 6):
                delivery = await soon(anext(deliveries))
                assert (text(delivery), delivery.attempt) == ("poison", attempt)
                await delivery.nack()
            assert await read_and_ack(deliveries, 1) == ["healthy"]
            letter = await soon(anext(dead))
            await letter.ack()
        assert letter.message.data == b"poison"
        assert letter.message.attributes["ce-type"] == "x"

    async def test_a_topic_without_subscriptions_takes_messages(self, policy: Policy, connect: Connect) -> None:
        """They are dropped, and nobody is told: so it is with Pub/Sub."""
        bus, _ = await connect([])
        assert await publish(bus, "into the void")

    async def test_a_subscriber_that_was_cancelled_goes_on(self, policy: Policy, connect: Connect) -> None:
        """Giving up the wait for a message loses none."""
        reader = policy()
        bus, _ = await connect([reader])
        async with bus.pull(reader) as deliveries:
            for turns in range(1, 20):
                waiting = asyncio.ensure_future(soon(anext(deliveries)))
                for _ in range(turns):
                    await asyncio.sleep(0)
                published = asyncio.ensure_future(publish(bus, str(turns)))
                for _ in range(turns):
                    await asyncio.sleep(0)
                waiting.cancel()
                await published
                (result,) = await asyncio.gather(waiting, return_exceptions=True)
                delivery = await soon(anext(deliveries)) if isinstance(result, BaseException) else result
                assert text(delivery) == str(turns)
                await delivery.ack()
