"""What the embedded bus promises beyond the contract: times by the clock, nothing left behind, trouble survived."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.local.bus import LocalBus
from infra.local.database import Database
from infra.local.queues import Lease
from infra.local.subscriber import LEASE_BATCH
from schemas.errors import BusUnavailable, NotFound
from schemas.ports import Clock, Delivery, Message, Subscription
from schemas.topics import DEAD_LETTERS
from tests.contracts.waiting import soon, take
from tests.local.clock import HandClock

READER = Subscription("reader", "topic", ack_deadline=10, max_lease=60, retry_min=1, retry_max=5, max_attempts=6)
ORDERED = Subscription("ordered", "ordered-topic", ordered=True, ack_deadline=10, max_attempts=3)
UNDERTAKER = Subscription("undertaker", DEAD_LETTERS, ack_deadline=10, max_attempts=2, retry_min=0, retry_max=0)
SUBSCRIPTIONS = (READER, ORDERED, UNDERTAKER)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the file is."""
    return tmp_path / "pigeon.db"


@pytest.fixture
async def database(path: Path) -> AsyncIterator[Database]:
    """An open database."""
    async with Database(path, lock_timeout=0.1) as database:
        yield database


@pytest.fixture
def clock() -> HandClock:
    """Time, in our hands."""
    return HandClock()


@pytest.fixture
def bus(database: Database, clock: Clock) -> LocalBus:
    """A bus with three subscriptions."""
    return LocalBus(database, topics=["topic", "ordered-topic", "lonely"], subscriptions=SUBSCRIPTIONS, clock=clock)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Somebody else writes, and does not come to an end."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    yield
    connection.execute("ROLLBACK")
    connection.close()


async def rows(database: Database, table: str) -> int:
    """How many rows a table has."""
    ((count,),) = await database.read(lambda connection: connection.execute(f"SELECT count(*) FROM {table}").fetchall())
    return int(count)


async def calm(database: Database) -> None:
    """Return when everybody who was awake has looked at the database."""
    for _ in range(5):
        await asyncio.sleep(0)
        await database.write(lambda write: None)


async def test_a_settled_message_leaves_nothing(bus: LocalBus, database: Database) -> None:
    """Two thousand messages come and go without a row staying."""
    for burst in range(20):
        await asyncio.gather(
            *(bus.publish("ordered-topic", Message(b"x", {}, f"k{number % 7}")) for number in range(100))
        )
        async with bus.pull(ORDERED) as deliveries:
            for delivery in await _all(deliveries, 100):
                assert delivery.attempt == 1, burst
    assert await rows(database, "messages") == 0
    assert await rows(database, "deliveries") == 0


async def _all(deliveries: AsyncIterator[Delivery], count: int) -> list[Delivery]:
    """Take and ack that many."""
    taken = []
    for _ in range(count):
        taken.append(await soon(anext(deliveries)))
        await taken[-1].ack()
    return taken


@pytest.mark.slow
async def test_the_file_does_not_grow_with_traffic(bus: LocalBus, database: Database) -> None:
    """Ten thousand messages that were acked take no more room than a thousand."""

    async def traffic(bursts: int) -> int:
        for _ in range(bursts):
            await asyncio.gather(*(bus.publish("topic", Message(bytes(2_000))) for _ in range(100)))
            async with bus.pull(READER) as deliveries:
                await asyncio.gather(*[delivery.ack() for delivery in await take(deliveries, 100)])
        ((pages,),) = await database.read(lambda connection: connection.execute("PRAGMA page_count").fetchall())
        return int(pages)

    early = await traffic(10)
    assert await traffic(90) <= early * 1.2
    assert await rows(database, "messages") == 0


async def test_a_topic_nobody_reads_keeps_nothing(bus: LocalBus, database: Database) -> None:
    """Dropped at once, as Pub/Sub does, and still with an id of its own."""
    ids = {await bus.publish("lonely", Message(b"x")) for _ in range(3)}
    assert len(ids) == 3
    assert await rows(database, "messages") == 0


async def test_backoff_doubles_up_to_its_limit(bus: LocalBus, clock: HandClock, database: Database) -> None:
    """Of an unordered message that is given back again and again."""
    await bus.publish("topic", Message(b"x"))
    async with bus.pull(READER) as deliveries:
        delivery = await soon(anext(deliveries))
        for seconds in (1, 2, 4, 5, 5):
            await delivery.nack()
            waiting = asyncio.ensure_future(soon(anext(deliveries)))
            await calm(database)
            clock.advance(seconds - 0.01)
            await calm(database)
            assert not waiting.done()
            clock.advance(0.02)
            delivery = await waiting
        await delivery.ack()


async def test_an_ordered_message_comes_again_at_once(bus: LocalBus) -> None:
    """After a nack, without any time passing."""
    await bus.publish("ordered-topic", Message(b"x", {}, "k"))
    async with bus.pull(ORDERED) as deliveries:
        await (await soon(anext(deliveries))).nack()
        assert (await soon(anext(deliveries))).attempt == 2


async def test_a_lease_is_extended_by_the_clock(bus: LocalBus, clock: HandClock, database: Database) -> None:
    """For as long as `max_lease` allows, and no longer."""
    await bus.publish("topic", Message(b"x"))
    async with bus.pull(READER) as deliveries:
        delivery = await soon(anext(deliveries))
        lost = asyncio.ensure_future(soon(delivery.lost()))
        for _ in range(16):
            clock.advance(3)
            await calm(database)
        assert not lost.done()
        for _ in range(6):
            clock.advance(3)
            await calm(database)
        await lost
        again = await soon(anext(deliveries))
        assert again.attempt == 2
        await again.ack()


async def test_a_dead_letter_tells_where_it_comes_from(bus: LocalBus) -> None:
    """Its own attributes stay; subscription, topic, attempts, id and ordering key are added."""
    message_id = await bus.publish("ordered-topic", Message(b"x", {"ce-type": "t"}, "k"))
    async with bus.pull(ORDERED) as deliveries, bus.pull(UNDERTAKER) as dead:
        for _ in range(3):
            await (await soon(anext(deliveries))).nack()
        idle = asyncio.ensure_future(soon(anext(deliveries)))
        letter = await soon(anext(dead))
        idle.cancel()
        await letter.ack()
    assert letter.message == Message(
        b"x",
        {
            "ce-type": "t",
            "pigeon-dead-letter-subscription": "ordered",
            "pigeon-dead-letter-topic": "ordered-topic",
            "pigeon-dead-letter-attempts": "3",
            "pigeon-dead-letter-message-id": message_id,
            "pigeon-dead-letter-ordering-key": "k",
        },
    )
    assert letter.message_id != message_id


async def test_dead_letters_are_never_buried_again(bus: LocalBus) -> None:
    """A message that nobody can handle stays in the dead letters however often it is tried."""
    await bus.publish(DEAD_LETTERS, Message(b"x"))
    async with bus.pull(UNDERTAKER) as dead:
        for attempt in range(1, 8):
            letter = await soon(anext(dead))
            assert letter.attempt == attempt
            await letter.nack()


async def test_a_holder_that_dies_uses_up_attempts(database: Database, bus: LocalBus, clock: HandClock) -> None:
    """A message that kills its worker every time becomes a dead letter too."""
    await bus.publish("ordered-topic", Message(b"deadly", {}, "k"))
    for _ in range(3):
        async with bus.pull(ORDERED) as deliveries:
            (await soon(anext(deliveries))).release()
        clock.advance(10)
    async with bus.pull(ORDERED) as deliveries, bus.pull(UNDERTAKER) as dead:
        idle = asyncio.ensure_future(soon(anext(deliveries)))
        assert (await soon(anext(dead))).message.data == b"deadly"
        idle.cancel()


async def test_leaving_returns_what_nobody_saw_without_an_attempt(bus: LocalBus) -> None:
    """Messages taken ahead of time were not tried; those that were handed out were."""
    for number in range(4):
        await bus.publish("topic", Message(str(number).encode()))
    async with bus.pull(READER) as deliveries:
        await take(deliveries, 1)
    async with bus.pull(READER) as deliveries:
        taken = await _all(deliveries, 4)
    assert sorted((delivery.message.data, delivery.attempt) for delivery in taken) == [
        (b"0", 2),
        (b"1", 1),
        (b"2", 1),
        (b"3", 1),
    ]


async def test_a_released_message_is_not_given_back_on_leaving(bus: LocalBus, clock: HandClock) -> None:
    """It comes again at its deadline, not before: its new holder may be at work already."""
    await bus.publish("topic", Message(b"x"))
    async with bus.pull(READER) as deliveries:
        (await soon(anext(deliveries))).release()
    async with bus.pull(READER) as deliveries:
        waiting = asyncio.ensure_future(soon(anext(deliveries)))
        await calm(bus._database)
        assert not waiting.done()
        clock.advance(10.1)
        assert (await waiting).attempt == 2


async def test_a_released_message_makes_room(bus: LocalBus, database: Database) -> None:
    """It does not count against `max_outstanding`."""
    single = Subscription("reader", "topic", max_outstanding=1)
    for number in range(2):
        await bus.publish("topic", Message(str(number).encode()))
    async with bus.pull(single) as deliveries:
        (await soon(anext(deliveries))).release()
        assert (await soon(anext(deliveries))).message.data == b"1"


async def test_one_subscriber_does_not_take_everything(bus: LocalBus) -> None:
    """Another finds messages left that came before it did."""
    for number in range(3 * LEASE_BATCH):
        await bus.publish("topic", Message(str(number).encode()))
    async with bus.pull(READER) as first, bus.pull(READER) as second:
        await take(first, 1)
        await take(second, 1)


async def test_a_settled_delivery_stays_settled(bus: LocalBus) -> None:
    """Acking twice is harmless; a nack after an ack brings nothing back."""
    await bus.publish("ordered-topic", Message(b"1", {}, "k"))
    await bus.publish("ordered-topic", Message(b"2", {}, "k"))
    async with bus.pull(ORDERED) as deliveries:
        first = await soon(anext(deliveries))
        await first.ack()
        await first.ack()
        await first.nack()
        first.release()
        second = await soon(anext(deliveries))
        assert (second.message.data, second.attempt) == (b"2", 1)


async def test_a_subscriber_outlasts_a_locked_database(
    bus: LocalBus, database: Database, path: Path, clock: HandClock
) -> None:
    """It waits and goes on; publishing and acking say what is wrong meanwhile, and may be tried again."""
    await bus.publish("topic", Message(b"1"))
    async with bus.pull(READER) as deliveries:
        delivery = await soon(anext(deliveries))
        waiting = asyncio.ensure_future(soon(anext(deliveries)))
        with locked(path):
            with pytest.raises(BusUnavailable):
                await delivery.ack()
            with pytest.raises(BusUnavailable):
                await bus.publish("topic", Message(b"2"))
        await delivery.ack()
        await bus.publish("topic", Message(b"2"))
        clock.advance(1)
        assert (await waiting).message.data == b"2"


async def test_a_lease_that_cannot_be_extended_is_lost(
    bus: LocalBus, database: Database, path: Path, clock: HandClock
) -> None:
    """The holder is told at its deadline, even while the database is out of reach."""
    await bus.publish("topic", Message(b"1"))
    async with bus.pull(READER) as deliveries:
        delivery = await soon(anext(deliveries))
        lost = asyncio.ensure_future(soon(delivery.lost()))
        await calm(database)
        with locked(path):
            while not lost.done():
                clock.advance(3.4)
                with pytest.raises(BusUnavailable):
                    await bus.publish("topic", Message(b"2"))
        await lost


async def test_pulling_needs_a_subscription(bus: LocalBus) -> None:
    """One that the bus was not given is not found."""
    with pytest.raises(NotFound):
        async with bus.pull(Subscription("other", "topic")):
            pass


async def test_a_bus_that_was_never_opened_is_unavailable(tmp_path: Path, clock: HandClock) -> None:
    """An error that names itself, not a hang."""
    bus = LocalBus(Database(tmp_path / "never.db"), topics=["topic"], subscriptions=[READER], clock=clock)
    async with bus.pull(READER) as deliveries:
        with pytest.raises(BusUnavailable, match="closed"):
            await anext(deliveries)


def test_a_subscription_needs_a_topic(database: Database, clock: HandClock) -> None:
    """A wrong configuration shows at the start."""
    with pytest.raises(ValueError, match="which is no topic"):
        LocalBus(database, topics=["topic"], subscriptions=[Subscription("reader", "tpoic")], clock=clock)


async def test_an_empty_message_is_refused(bus: LocalBus) -> None:
    """As Pub/Sub refuses it."""
    with pytest.raises(ValueError, match="data or attributes"):
        await bus.publish("topic", Message(b""))


async def test_nothing_is_left_running(path: Path, clock: HandClock) -> None:
    """Leaving the subscriber and closing the database ends every task."""
    async with Database(path) as database:
        bus = LocalBus(database, topics=["topic"], subscriptions=[READER], clock=clock)
        await bus.publish("topic", Message(b"x"))
        async with bus.pull(READER) as deliveries:
            await take(deliveries, 1)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


class CountingBus(LocalBus):
    """Counts how often messages were asked for; every time is a commit."""

    looks = 0

    def submit_lease(self, subscription: Subscription, holder: int, limit: int) -> asyncio.Future[Lease]:
        """See LocalBus.submit_lease."""
        self.looks += 1
        return super().submit_lease(subscription, holder, limit)


async def test_a_message_costs_one_look(database: Database, clock: HandClock) -> None:
    """Neither taking a message nor acking it makes the subscriber look for more where there is no more."""
    bus = CountingBus(database, topics=["topic", "ordered-topic"], subscriptions=SUBSCRIPTIONS, clock=clock)
    async with bus.pull(ORDERED) as deliveries:
        waiting = asyncio.ensure_future(anext(deliveries))
        for number in range(10):
            await bus.publish("ordered-topic", Message(b"%d" % number, {}, "key"))
            delivery = await soon(waiting)
            waiting = asyncio.ensure_future(anext(deliveries))
            await delivery.ack()
            await calm(database)
        waiting.cancel()
    assert bus.looks == 1 + 10  # the first one finds nothing
