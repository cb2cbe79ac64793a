"""Bad days of the Pub/Sub adapter: every call fails, wires are cut, the emulator dies, a worker is killed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress

import grpc
import pytest

from infra.adapters import pubsub_calls
from infra.adapters.pubsub import PubsubBus, pubsub_bus
from infra.adapters.pubsub_calls import Calls
from infra.adapters.pubsub_lane import Lane
from infra.adapters.pubsub_topology import policy
from infra.emulators import PUBSUB
from schemas.errors import BusUnavailable, NotFound
from schemas.ports import Delivery, Message, Subscription
from schemas.topics import DEAD_LETTERS_SUBSCRIPTION, SUBSCRIPTIONS
from tests.contracts.waiting import soon
from tests.emulators.faults import Faults, wire
from tests.emulators.fixtures import project, pubsub_host
from tests.emulators.machinery import machine

__all__ = ["project", "pubsub_host"]

Code = grpc.StatusCode
PASSING = [Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.ABORTED]
TOPIC = "happenings"
READER = Subscription("reader", TOPIC, ordered=True, ack_deadline=2.0, max_attempts=100)


@pytest.fixture
def faults() -> Faults:
    """None yet."""
    return Faults()


@pytest.fixture
async def bus(pubsub_host: str, project: str, faults: Faults) -> AsyncIterator[PubsubBus]:
    """A bus whose calls can be made to fail."""
    async with pubsub_bus(project, pubsub_host, interceptors=faults.interceptors()) as opened:
        await opened.create({TOPIC}, [READER])
        yield opened


@contextmanager
def impatient() -> Iterator[None]:
    """Calls that give up soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pubsub_calls, "CALL_SECONDS", 0.3)
        yield


async def test_a_publish_that_fails_in_passing_is_tried_again(bus: PubsubBus, faults: Faults) -> None:
    """The message arrives, more than once where only the answer was lost."""
    faults.before, faults.after = list(PASSING), [Code.UNAVAILABLE]
    await bus.publish(TOPIC, Message(b"one", ordering_key="k"))
    assert not faults.before
    async with bus.pull(READER) as deliveries:
        delivery = await soon(anext(deliveries))
        assert delivery.message.data == b"one"
        await delivery.ack()


async def test_a_publish_that_keeps_failing_says_so_and_the_key_goes_on(bus: PubsubBus, faults: Faults) -> None:
    """BusUnavailable within the time-out, for what waits behind it, too; the next publish of the key works."""
    faults.before = [Code.UNAVAILABLE] * 1_000
    with impatient():
        results = await asyncio.gather(
            *(bus.publish(TOPIC, Message(b"x", ordering_key="k")) for _ in range(3)), return_exceptions=True
        )
    assert all(isinstance(result, BusUnavailable) for result in results)
    faults.before = []
    assert await bus.publish(TOPIC, Message(b"y", ordering_key="k"))


async def test_a_pull_and_an_ack_that_fail_in_passing_are_tried_again(bus: PubsubBus, faults: Faults) -> None:
    """The subscriber goes on by itself, and the message is settled once."""
    await bus.publish(TOPIC, Message(b"1", ordering_key="k"))
    faults.before = list(PASSING)
    async with bus.pull(READER) as deliveries:
        first = await soon(anext(deliveries))
        faults.before = list(PASSING)
        await first.ack()
        await bus.publish(TOPIC, Message(b"2", ordering_key="k"))
        second = await soon(anext(deliveries))
        assert (second.message.data, second.attempt) == (b"2", 1)
        await second.ack()


async def test_an_ack_that_keeps_failing_lets_the_message_come_again(bus: PubsubBus, faults: Faults) -> None:
    """It says so, and the lease is not extended for ever by a worker that has done with it."""
    await bus.publish(TOPIC, Message(b"1"))
    async with bus.pull(READER) as deliveries:
        first = await soon(anext(deliveries))
        faults.before = [Code.UNAVAILABLE] * 1_000
        with impatient(), pytest.raises(BusUnavailable):
            await first.ack()
        faults.before = []
        again = await soon(anext(deliveries))
        assert (again.message_id, again.attempt) == (first.message_id, 2)
        await again.ack()


async def test_a_lease_that_cannot_be_extended_is_lost(bus: PubsubBus, faults: Faults) -> None:
    """By our own clock, before Pub/Sub gives the message to another."""
    await bus.publish(TOPIC, Message(b"1"))
    async with bus.pull(READER) as deliveries:
        first = await soon(anext(deliveries))
        faults.before = [Code.UNAVAILABLE] * 10_000
        await soon(first.lost())
        faults.before = []
        await (await soon(anext(deliveries))).ack()


async def test_nothing_is_lost_when_wires_are_cut_under_load(pubsub_host: str, project: str) -> None:
    """Every message has its effect once, in order, for a worker that remembers what it has done."""
    total, effects = 120, list[int]()
    async with wire(pubsub_host) as (line, address), pubsub_bus(project, address) as bus:
        await bus.create({TOPIC}, [READER])

        async def produce() -> None:
            for number in range(total):
                await bus.publish(TOPIC, Message(b"%d" % number, ordering_key="k"))
                if number % 40 == 20:
                    line.cut()

        async with asyncio.TaskGroup() as group, bus.pull(READER) as deliveries:
            group.create_task(produce())
            while len(effects) < total:
                delivery = await soon(anext(deliveries), 40.0)
                number = int(delivery.message.data)
                if number not in effects:
                    effects.append(number)
                await delivery.ack()
    assert line.cuts >= 3
    assert effects == list(range(total))


HOLDER = """
import asyncio, sys
from infra.adapters.pubsub import pubsub_bus
from tests.emulators.test_pubsub import READER

async def main(project, host):
    async with pubsub_bus(project, host) as bus, bus.pull(READER) as deliveries:
        print((await anext(deliveries)).message.data.decode(), flush=True)
        await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
async def test_a_killed_holders_message_is_taken_over(bus: PubsubBus, pubsub_host: str, project: str) -> None:
    """Within its ack deadline and a little: held for longer than that, then kill -9."""
    await bus.publish(TOPIC, Message(b"held", ordering_key="k"))
    command = (sys.executable, "-c", HOLDER, project, pubsub_host)
    holder = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert holder.stdout is not None
    assert await soon(holder.stdout.readline(), 60.0) == b"held\n"
    async with bus.pull(READER) as deliveries:
        with pytest.raises(TimeoutError):
            await soon(anext(deliveries), READER.ack_deadline * 1.5)
        holder.kill()
        await holder.wait()
        started = asyncio.get_running_loop().time()
        delivery = await soon(anext(deliveries))
        taken = asyncio.get_running_loop().time() - started
        assert (delivery.message.data, delivery.attempt) == (b"held", 2)
        assert taken < READER.ack_deadline + 2.0
        await delivery.ack()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["reader", "publisher"])
async def test_a_bus_outlives_its_emulator(project: str, first: str) -> None:
    """One that is killed and started again is empty; who publishes or reads first makes topics and subscriptions."""
    async with (
        machine(PUBSUB) as own,
        pubsub_bus(project, own.host) as bus,
        pubsub_bus(project, own.host) as stranger,
    ):
        await bus.create({TOPIC}, [READER])
        async with bus.pull(READER) as deliveries:
            await bus.publish(TOPIC, Message(b"before", ordering_key="k"))
            held = await soon(anext(deliveries))
            await own.kill()
            with impatient(), pytest.raises(BusUnavailable):
                await bus.publish(TOPIC, Message(b"nobody there"))
            await own.start()
            reading = asyncio.ensure_future(anext(deliveries))
            if first == "publisher":
                await soon(bus.publish(TOPIC, Message(b"after", ordering_key="k")), 40.0)
            else:
                # of another key: those of the held one's wait until that is handled
                await soon(_insist(stranger, Message(b"after", ordering_key="other"), reading), 40.0)
            await held.ack()
            delivery = await soon(reading, 40.0)
            assert delivery.message.data == b"after"
            await delivery.ack()


async def _insist(bus: PubsubBus, message: Message, read: asyncio.Future[Delivery]) -> None:
    """Publish until it is read: between the making of a topic and that of its subscription nobody reads."""
    while not read.done():
        with suppress(BusUnavailable, NotFound):
            await bus.publish(TOPIC, message)
        await asyncio.wait({read}, timeout=0.2)


async def test_a_subscription_that_vanishes_is_waited_for(pubsub_host: str, project: str) -> None:
    """Where it is not ours to make, loudly. What was handed over before is handled to the end, in its order, with
    nothing to settle; then come the new subscription's messages."""
    async with pubsub_bus(project, pubsub_host) as maker, pubsub_bus(project, pubsub_host) as bus:
        await maker.create({TOPIC}, [READER])
        for number in range(3):
            await maker.publish(TOPIC, Message(b"old %d" % number, ordering_key="k"))
        async with bus.pull(READER) as deliveries, grpc.aio.insecure_channel(pubsub_host) as channel:
            first = await soon(anext(deliveries))
            calls = Calls(channel, project)
            await calls.subscriber.delete_subscription({"subscription": calls.subscription(READER.name)})
            rest = asyncio.ensure_future(_read(deliveries, 3))
            with pytest.raises(TimeoutError):
                await soon(first.lost(), READER.ack_deadline * 1.5)
            await maker.create({TOPIC}, [READER])
            await maker.publish(TOPIC, Message(b"new", ordering_key="k"))
            await first.ack()
            assert await soon(rest, 40.0) == [b"old 1", b"old 2", b"new"]


async def _read(deliveries: AsyncIterator[Delivery], count: int) -> list[bytes]:
    read = []
    for _ in range(count):
        delivery = await anext(deliveries)
        read.append(delivery.message.data)
        await delivery.ack()
    return read


async def test_a_subscription_that_is_not_there_is_not_found(bus: PubsubBus) -> None:
    """Nobody waits for ever on a misspelt name."""
    async with bus.pull(Subscription("no-such-reader", TOPIC)) as deliveries:
        with pytest.raises(NotFound):
            await soon(anext(deliveries))


async def test_the_declared_subscriptions_are_made_as_declared(bus: PubsubBus, pubsub_host: str, project: str) -> None:
    """Ordering, deadlines, retention, back-off and dead letters reach Pub/Sub; dead letters have none of their own."""
    await bus.create({one.topic for one in SUBSCRIPTIONS}, SUBSCRIPTIONS)
    await bus.create({one.topic for one in SUBSCRIPTIONS}, SUBSCRIPTIONS)
    async with grpc.aio.insecure_channel(pubsub_host) as channel:
        calls = Calls(channel, project)
        for one in SUBSCRIPTIONS:
            made = await calls.subscriber.get_subscription({"subscription": calls.subscription(one.name)})
            assert made.ack_deadline_seconds == one.ack_deadline
            assert made.enable_message_ordering == one.ordered
            assert made.message_retention_duration.total_seconds() == one.retention
            expected = 0 if one is DEAD_LETTERS_SUBSCRIPTION else one.max_attempts
            assert made.dead_letter_policy.max_delivery_attempts == expected
            assert ("retry_policy" in policy(calls, one)) != one.ordered


async def test_a_lane_batches_what_waits() -> None:
    """One alone goes at once; what is submitted meanwhile goes together, in order, within the limits."""
    sent: list[list[int]] = []
    gate = asyncio.Event()

    async def send(items: list[int]) -> list[int]:
        sent.append(items)
        await gate.wait()
        return [item * 2 for item in items]

    lane: Lane[int, int] = Lane(send, max_items=3, weigh=lambda item: item, max_weight=10)
    futures = [lane.submit(item) for item in (1, 2, 3, 4, 9, 9, 20)]
    futures[1].cancel()
    gate.set()
    results = await soon(asyncio.gather(*futures, return_exceptions=True))
    assert [result for result in results if isinstance(result, int)] == [2, 6, 8, 18, 18, 40]
    assert sent == [[1, 3, 4], [9], [9], [20]]
    assert lane.idle
