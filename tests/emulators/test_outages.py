"""Outages under load: an emulator that is frozen, out of reach, or killed with all it knew, while people work.

A cloud that is away keeps what it has: the first two stand for that, and nothing is lost. An emulator that is killed
has forgotten everything. Pub/Sub's messages are made good: what was recorded goes on, what was not is asked for again.
The documents are what sessions are made of: without them there are none, and the stack goes on with new ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, AsyncExitStack
from typing import Any

import pytest

from infra.emulators import FIRESTORE, PUBSUB
from infra.profiles import RULES
from tests.emulators.faults import wire
from tests.emulators.load import PATIENCE, answered, ready, run, stack, work_goes_on
from tests.emulators.machinery import machine
from tests.journeys.conftest import MakeStack, make_stack
from tests.journeys.stack import Stack
from tests.waiting import until

__all__ = ["make_stack"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

OUTAGE_SECONDS = 12.0  # longer than a lease, and than the time-out of a call

Outage = Callable[[], AbstractContextManager[None]]


@pytest.mark.parametrize("how", ["frozen", "out of reach"])
@pytest.mark.parametrize("what", ["pubsub", "firestore"])
async def test_nothing_is_lost_in_an_outage(
    make_stack: MakeStack, project: str, pubsub_host: str, firestore_host: str, what: str, how: str
) -> None:
    """Output that is printed meanwhile comes later, whole; commands run once, also those that were sent meanwhile."""
    hosts = {"pubsub": pubsub_host, "firestore": firestore_host}
    async with AsyncExitStack() as opened:
        outage: Outage
        if how == "frozen":
            own = await opened.enter_async_context(machine(PUBSUB if what == "pubsub" else FIRESTORE))
            hosts[what], outage = own.host, own.frozen
        else:
            line, hosts[what] = await opened.enter_async_context(wire(hosts[what]))
            outage = line.down
        whole = await opened.enter_async_context(stack(make_stack, project, **hosts))

        async def through(_: str) -> None:
            with outage():
                await asyncio.sleep(OUTAGE_SECONDS)

        async with whole.user() as alice:
            await work_goes_on(alice, through)


async def test_a_pubsub_that_forgot_everything_costs_no_output(
    make_stack: MakeStack, project: str, firestore_host: str
) -> None:
    """kill -9 and a new one: topics and subscriptions are there again by themselves, the sweep has every session
    tended, and who sends a command again that was lost on the way has it run once."""
    times: dict[str, Any] = {"tended_every": 1, "tended_stale": 5, "request_timeout": 5}
    async with machine(PUBSUB) as own, stack(make_stack, project, own.host, firestore_host, **times) as whole:

        async def through(_: str) -> None:
            await own.kill()
            await own.start()

        async with whole.user() as alice:
            await work_goes_on(alice, through)
            await work_goes_on(alice, through)
        assert "are made again" in whole.log()


async def test_a_firestore_that_forgot_everything_ends_its_sessions_and_no_more(
    make_stack: MakeStack, project: str, pubsub_host: str
) -> None:
    """kill -9 and a new one: no session of before is left, nor its sandbox; new ones work, on the same processes."""
    limits: dict[str, Any] = {"orphan_grace": 2, "tended_every": 1}
    async with (
        machine(FIRESTORE, RULES) as own,
        stack(make_stack, project, pubsub_host, own.host, **limits) as whole,
        whole.user() as alice,
    ):
        before = await ready(alice)
        body = {"sessionId": before, "command": "while true; do echo on; sleep 0.1; done"}
        await answered(alice, "POST", "execute-command", json=body)
        await alice.until_output(before, b"on\r\non\r\n")
        await own.kill()
        await own.start()

        async def gone() -> bool:
            return (await alice.http.get(alice.url(f"get-status/{before}"))).status_code == 404

        await until(gone, "the session is unknown", PATIENCE)
        await until(lambda: _without_sandbox(whole, before), "its sandbox is removed", PATIENCE)
        session = await ready(alice)
        record = await run(alice, session, "seq 1 1000")
        output = await alice.read(session, record["startOffset"], record["endOffset"])
        assert output == b"".join(b"%d\r\n" % number for number in range(1, 1001))
        assert [process.returncode for process in whole.processes] == [None]


async def _without_sandbox(whole: Stack, session: str) -> bool:
    return not any(session in entry.name for entry in (whole.state / "sandboxes").iterdir())
