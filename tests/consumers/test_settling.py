"""What becomes of messages when settling them fails, or when a handler is refused by the agent."""

from __future__ import annotations

import pytest

from consumers.worker import SETTLE_TRIES
from infra.local.subscriber import LocalDelivery, Subscriber
from schemas.errors import BusUnavailable
from schemas.events import CommandSubmitted
from tests.consumers.house import House


@pytest.mark.parametrize("failures", [1, pytest.param(SETTLE_TRIES, marks=pytest.mark.slow)])
async def test_an_ack_that_fails_holds_up_its_session_only_shortly(
    staffed: House, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """The bus is away when a message is acknowledged: the next command runs within the ack deadline, not the lease."""
    session = await staffed.ready()
    settle, failed = Subscriber.settle, 0

    async def failing(subscriber: Subscriber, delivery: LocalDelivery) -> None:
        nonlocal failed
        if CommandSubmitted.type in delivery.message.attributes["ce-type"] and failed < failures:
            failed += 1
            raise BusUnavailable("no disk space")
        await settle(subscriber, delivery)

    monkeypatch.setattr(Subscriber, "settle", failing)
    first = await staffed.submit(session, "echo one >> log")
    assert (await staffed.run(session, "cat log"))[1] == b"one\r\n"
    assert (await staffed.ended(session, first)).exit_code == 0
    assert failed == failures
