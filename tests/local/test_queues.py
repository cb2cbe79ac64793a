"""What a delivery costs: by the index, whatever waits."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.local import queues
from infra.local.schema import connect, prepare
from infra.local.writer import Write
from schemas.ports import Message, Subscription
from schemas.topics import DEAD_LETTERS

READER = Subscription("reader", "topic", ordered=True, max_attempts=2)
UNDERTAKER = Subscription("undertaker", DEAD_LETTERS)
HOLDER = 7
Step = Callable[["Keys", int], None]


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """An empty file, in autocommit."""
    prepare(tmp_path / "pigeon.db", 1.0)
    with closing(connect(tmp_path / "pigeon.db", 1.0)) as connection:
        yield connection


def live(write: Write) -> None:
    """Everything that happens to messages."""
    for number in range(4):
        queues.publish(write, "topic", Message(b"x", {}, f"k{number % 2}"), [READER], 0)
    taken = queues.lease(write, READER, HOLDER, 10, 1, [UNDERTAKER])
    first, second = (leased.lease for leased in taken.messages)
    assert queues.extend(write, READER, HOLDER, {first.message: 1, second.message: 1}, 10**9)
    assert queues.settle(write, READER, first)
    assert queues.give_back(write, READER, second, 0)
    (_, again) = (leased.lease for leased in queues.lease(write, READER, HOLDER, 10, 2, []).messages)
    queues.take_back(write, READER, [again], [])
    assert queues.lease(write, READER, HOLDER, 10, 3, [UNDERTAKER]).next_due == 0


def test_no_statement_reads_a_whole_table(connection: sqlite3.Connection) -> None:
    """Publishing, taking and settling cost the same with a million messages waiting."""
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    live(Write(connection))
    connection.set_trace_callback(None)
    plans = {
        f"{statement}: {row[3]}"
        for statement in statements
        for row in connection.execute("EXPLAIN QUERY PLAN " + statement).fetchall()
    }
    assert len(statements) > 40
    assert not [plan for plan in plans if "SCAN deliveries" in plan or "SCAN messages" in plan or "TEMP" in plan]


class Keys:
    """What should happen, in a few lines: per key a list of messages, of which only the first may be out."""

    def __init__(self, write: Write) -> None:
        self.write = write
        self.now = 1
        self.waiting: dict[str, list[int]] = {}
        self.attempts: dict[int, int] = {}
        self.out: dict[int, tuple[queues.Held, int]] = {}  # the last lease of a message, and its end
        self.old: list[queues.Held] = []

    def publish(self, choice: int) -> None:
        """One message under one of four keys."""
        key = f"k{choice % 4}"
        self.waiting.setdefault(key, []).append(
            queues.publish(self.write, "topic", Message(b"x", {}, key), [STUBBORN], 0)
        )

    def take(self, choice: int) -> None:
        """Whatever is given out is the first of its key, and nobody's."""
        lease = queues.lease(self.write, STUBBORN, HOLDER, 1 + choice % 3, self.now, [])
        for leased in lease.messages:
            held = leased.lease
            assert self.waiting[held.ordering_key][0] == held.message
            assert held.message not in self.out or self.out[held.message][1] <= self.now
            assert held.attempt == self.attempts.get(held.message, 0) + 1
            self.attempts[held.message] = held.attempt
            self.old += [self.out[held.message][0]] if held.message in self.out else []
            self.out[held.message] = (held, lease.due)

    def settle(self, choice: int) -> None:
        """The holder's ack counts."""
        if self.out:
            held, _ = self.out.pop(sorted(self.out)[choice % len(self.out)])
            assert queues.settle(self.write, STUBBORN, held)
            assert self.waiting[held.ordering_key].pop(0) == held.message
            self.old.append(held)

    def settle_late(self, choice: int) -> None:
        """A stale ack counts for nothing."""
        if self.old:
            assert not queues.settle(self.write, STUBBORN, self.old[choice % len(self.old)])

    def give_back(self, choice: int) -> None:
        """A nack brings the message again at once."""
        live = [number for number, (_, end) in sorted(self.out.items()) if end > self.now]
        if live:
            held, _ = self.out[live[choice % len(live)]]
            assert queues.give_back(self.write, STUBBORN, held, 0)
            self.out[held.message] = (held, self.now)

    def pass_time(self, choice: int) -> None:
        """Up to one and a half deadlines."""
        self.now += choice % 15 * queues.SECOND


STUBBORN = Subscription("reader", "topic", ordered=True, ack_deadline=10, max_attempts=1_000_000)
STEPS = (Keys.publish, Keys.take, Keys.settle, Keys.settle_late, Keys.give_back, Keys.pass_time)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 60)), max_size=60))
def test_keys_keep_their_order_whatever_happens(connection: sqlite3.Connection, steps: list[tuple[Step, int]]) -> None:
    """Any mixture of publishing, taking, settling, late acks, nacks and time: no message is lost, doubled or early."""
    for table in ("messages", "deliveries"):
        connection.execute(f"DELETE FROM {table}")
    keys = Keys(Write(connection))
    for step, choice in steps:
        step(keys, choice)
    while any(keys.waiting.values()):
        keys.now += 11 * queues.SECOND
        keys.take(2)
        for _ in range(len(keys.out)):
            keys.settle(0)
    assert connection.execute("SELECT count(*) FROM messages").fetchall() == [(0,)]
    assert connection.execute("SELECT count(*) FROM deliveries").fetchall() == [(0,)]
