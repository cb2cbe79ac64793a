"""What a delivery costs: by the index, whatever waits."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from infra.local import queues
from infra.local.schema import connect, prepare
from infra.local.writer import Write
from schemas.ports import Message, Subscription
from schemas.topics import DEAD_LETTERS

READER = Subscription("reader", "topic", ordered=True, max_attempts=2)
UNDERTAKER = Subscription("undertaker", DEAD_LETTERS)
HOLDER = 7


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
