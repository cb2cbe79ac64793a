"""Messages and their deliveries, in SQL. What runs here runs on the writing thread of a Database.

A message is stored once; each subscription of its topic gets a row of deliveries until it has settled it. `due`
says when that row may be given out: 0 is now, in order of `turn`; a lease and a back-off are nothing but a time in
the future; NULL waits for the message before it of the same ordering key. So a lease that ran out needs nobody to
notice it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgpack

from infra.local.writer import Write
from schemas.ports import Message, Subscription
from schemas.topics import DEAD_LETTERS

SECOND = 1_000_000  # in the microseconds of the tables
DEAD_LETTER_PREFIX = "pigeon-dead-letter-"


@dataclass(frozen=True, slots=True)
class Held:
    """One lease: this attempt at this message. An attempt that is not the last one any more is stale."""

    message: int
    attempt: int
    ordering_key: str = ""


@dataclass(frozen=True, slots=True)
class Leased:
    """A message given out."""

    lease: Held
    message: Message
    published: int


@dataclass(frozen=True, slots=True)
class Lease:
    """What a subscriber got, and until when; and when something of the subscription becomes due next, if anything
    does. Times are in microseconds."""

    messages: list[Leased]
    due: int
    next_due: int | None


def subscription_bell(subscription: str) -> str:
    """Rings when a message of the subscription becomes due."""
    return "subscription " + subscription


def publish(write: Write, topic: str, message: Message, subscriptions: Sequence[Subscription], now: int) -> int:
    """Store a message for these subscriptions of the topic; returns its id."""
    number = write.number()
    for subscription in subscriptions:
        _enqueue(write, subscription, message.ordering_key, number)
    if subscriptions:
        attributes = msgpack.packb(dict(message.attributes))
        write.execute(
            "INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?)",
            (number, topic, message.ordering_key, now, len(subscriptions), attributes, message.data),
        )
    return number


def _enqueue(write: Write, subscription: Subscription, ordering_key: str, number: int) -> None:
    key = ordering_key if subscription.ordered else ""
    waits = (
        key
        and write.execute(
            "SELECT 1 FROM deliveries WHERE subscription = ? AND ordering_key = ? LIMIT 1", (subscription.name, key)
        ).fetchall()
    )
    write.execute(
        "INSERT INTO deliveries VALUES (?, ?, ?, 0, ?, ?, NULL)",
        (subscription.name, key, number, number, None if waits else 0),
    )
    if not waits:
        write.ring(subscription_bell(subscription.name))


def lease(
    write: Write,
    subscription: Subscription,
    holder: int,
    limit: int,
    now: int,
    dead_letters: Sequence[Subscription],
) -> Lease:
    """Give out at most `limit` messages to `holder` until the ack deadline from now; those that were given out
    often enough go to `dead_letters` instead."""
    _make_due(write, subscription, now)
    due = now + int(subscription.ack_deadline * SECOND)
    messages = []
    for key, number, attempts in _due(write, subscription, limit):
        held = Held(number, attempts + 1, key)
        leased = _load(write, held)
        if attempts >= subscription.max_attempts and subscription.topic != DEAD_LETTERS:
            _bury(write, subscription, Held(number, attempts, key), leased.message, dead_letters, now)
            continue
        write.execute(
            "UPDATE deliveries SET attempts = ?, due = ?, holder = ? "
            "WHERE subscription = ? AND ordering_key = ? AND message = ?",
            (held.attempt, due, holder, subscription.name, key, number),
        )
        messages.append(leased)
    return Lease(messages, due, _next_due(write, subscription))


def _make_due(write: Write, subscription: Subscription, now: int) -> None:
    write.execute(
        "UPDATE deliveries SET due = 0 WHERE subscription = ? AND due > 0 AND due <= ?", (subscription.name, now)
    )


def _due(write: Write, subscription: Subscription, limit: int) -> list[tuple[str, int, int]]:
    return write.execute(
        "SELECT ordering_key, message, attempts FROM deliveries WHERE subscription = ? AND due = 0 "
        "ORDER BY turn LIMIT ?",
        (subscription.name, limit),
    ).fetchall()


def _next_due(write: Write, subscription: Subscription) -> int | None:
    """The soonest time that is set; 0 if something is due already."""
    ((due,),) = write.execute(
        "SELECT min(due) FROM deliveries WHERE subscription = ? AND due IS NOT NULL", (subscription.name,)
    ).fetchall()
    return None if due is None else int(due)


def _load(write: Write, held: Held) -> Leased:
    ((key, published, attributes, data),) = write.execute(
        "SELECT ordering_key, published, attributes, data FROM messages WHERE id = ?", (held.message,)
    ).fetchall()
    return Leased(held, Message(data, msgpack.unpackb(attributes), key), published)


def _bury(
    write: Write,
    subscription: Subscription,
    held: Held,
    message: Message,
    dead_letters: Sequence[Subscription],
    now: int,
) -> None:
    """Move a message to the topic of dead letters, with what is known about its end."""
    known = {
        "subscription": subscription.name,
        "topic": subscription.topic,
        "attempts": str(held.attempt),
        "message-id": str(held.message),
        "ordering-key": message.ordering_key,
    }
    marks = {DEAD_LETTER_PREFIX + name: value for name, value in known.items()}
    publish(write, DEAD_LETTERS, Message(message.data, {**message.attributes, **marks}), dead_letters, now)
    settle(write, subscription, held)


def settle(write: Write, subscription: Subscription, held: Held) -> bool:
    """Take a message out of the subscription and let the next of its key follow; False if the lease was stale."""
    settled = write.execute(
        "DELETE FROM deliveries WHERE subscription = ? AND ordering_key = ? AND message = ? AND attempts = ?",
        (subscription.name, held.ordering_key, held.message, held.attempt),
    )
    if not settled.rowcount:
        return False
    if held.ordering_key:
        _advance(write, subscription, held.ordering_key)
    if not write.execute("DELETE FROM messages WHERE id = ? AND pending <= 1", (held.message,)).rowcount:
        write.execute("UPDATE messages SET pending = pending - 1 WHERE id = ?", (held.message,))
    return True


def _advance(write: Write, subscription: Subscription, ordering_key: str) -> None:
    """The next message of the key becomes due, behind whatever is due already: so no key starves another."""
    following = write.execute(
        "SELECT message FROM deliveries WHERE subscription = ? AND ordering_key = ? ORDER BY message LIMIT 1",
        (subscription.name, ordering_key),
    ).fetchall()
    if following:
        write.execute(
            "UPDATE deliveries SET due = 0, turn = ? WHERE subscription = ? AND ordering_key = ? AND message = ?",
            (write.number(), subscription.name, ordering_key, following[0][0]),
        )
        write.ring(subscription_bell(subscription.name))


def give_back(write: Write, subscription: Subscription, held: Held, due: int) -> bool:
    """End a lease without settling: the message comes again at `due` (0: now, after those that are due already)."""
    given = write.execute(
        "UPDATE deliveries SET due = ?, turn = ? "
        "WHERE subscription = ? AND ordering_key = ? AND message = ? AND attempts = ? AND due > 0",
        (due, write.number(), subscription.name, held.ordering_key, held.message, held.attempt),
    )
    if given.rowcount:
        write.ring(subscription_bell(subscription.name))
    return bool(given.rowcount)


def take_back(write: Write, subscription: Subscription, held: Iterable[Held], unseen: Iterable[Held]) -> None:
    """End the leases of a subscriber that leaves. What it never showed to anybody (`unseen`) was no attempt."""
    where = "WHERE subscription = ? AND ordering_key = ? AND message = ? AND attempts = ? AND due > 0"
    for changes, leases in (("due = 0", held), ("due = 0, attempts = attempts - 1", unseen)):
        for one in leases:
            write.execute(
                f"UPDATE deliveries SET {changes} {where}",  # noqa: S608
                (subscription.name, one.ordering_key, one.message, one.attempt),
            )
    write.ring(subscription_bell(subscription.name))


def extend(write: Write, subscription: Subscription, holder: int, attempts: Mapping[int, int], due: int) -> set[int]:
    """Move the end of the leases of these messages to `due`; returns those that are still this holder's."""
    rows = write.execute(
        "UPDATE deliveries SET due = ? WHERE subscription = ? AND due > 0 AND holder = ? "
        "AND message IN (SELECT value FROM json_each(?)) RETURNING message, attempts",
        (due, subscription.name, holder, json.dumps(list(attempts))),
    ).fetchall()
    return {message for message, attempt in rows if attempts[message] == attempt}
