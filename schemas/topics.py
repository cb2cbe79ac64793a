"""Topics and subscriptions, declared once: the embedded bus, the emulator set-up, the tests and Terraform read this."""

from __future__ import annotations

from schemas.ports import Subscription

SESSION_EVENTS = "session-events"
SESSION_LINKS = "session-links"
SCHEDULER_TICKS = "scheduler-ticks"
SESSION_LIFECYCLE = "session-lifecycle"
DEAD_LETTERS = "dead-letters"

TOPICS = (SESSION_EVENTS, SESSION_LINKS, SCHEDULER_TICKS, SESSION_LIFECYCLE, DEAD_LETTERS)
ORDERED_TOPICS = frozenset({SESSION_EVENTS})

HOUR = 3600.0

EVENTS_SUBSCRIPTION = Subscription(
    name="session-events-worker",
    topic=SESSION_EVENTS,
    ordered=True,
    ack_deadline=10.0,
    max_lease=600.0,
    max_attempts=10,
)
LINKS_SUBSCRIPTION = Subscription(
    name="session-links-tender",
    topic=SESSION_LINKS,
    ack_deadline=10.0,  # so that a dead worker is noticed in seconds
    max_lease=10 * HOUR,  # a session's longest life, with margin
    max_outstanding=200,
    max_attempts=100,
)
TICKS_SUBSCRIPTION = Subscription(
    name="scheduler-ticks-sweep",
    topic=SCHEDULER_TICKS,
    ack_deadline=60.0,
    max_outstanding=1,
    max_attempts=5,
    retention=600.0,  # Pub/Sub's least: an old tick is worth nothing
)
DEAD_LETTERS_SUBSCRIPTION = Subscription(
    name="dead-letters-undertaker", topic=DEAD_LETTERS, ack_deadline=30.0, max_outstanding=10, max_attempts=100
)

SUBSCRIPTIONS = (EVENTS_SUBSCRIPTION, LINKS_SUBSCRIPTION, TICKS_SUBSCRIPTION, DEAD_LETTERS_SUBSCRIPTION)
