"""Outages under load: an emulator that is frozen, out of reach, or killed with all it knew, while people work.

A cloud that is away keeps what it has: the first two stand for that, and nothing is lost. An emulator that is killed
has forgotten everything. Pub/Sub's messages are made good: what was recorded goes on, what was not is asked for again.
The documents are what sessions are made of: without them there are none, and the stack goes on with new ones.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import httpx
import pytest

from infra.emulators import FIRESTORE, PUBSUB
from infra.profiles import RULES
from schemas.ids import new_id
from tests.emulators.faults import wire
from tests.emulators.machinery import machine
from tests.journeys.conftest import MakeStack, make_stack
from tests.journeys.stack import Stack, User
from tests.waiting import until

__all__ = ["make_stack"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

OUTAGE_SECONDS = 12.0  # longer than a lease, and than the time-out of a call
PATIENCE = 120.0
RESEND_SECONDS = 5.0
LINES, PAUSE_SECONDS = 700, 0.02  # of a program that prints all the while
PRINTING = f"echo ran >> runs; for i in $(seq 1 {LINES}); do echo line $i; sleep {PAUSE_SECONDS}; done; seq 1 200000"
PRINTED = b"".join(b"line %d\r\n" % n for n in range(1, LINES + 1)) + b"".join(b"%d\r\n" % n for n in range(1, 200_001))

Outage = Callable[[], AbstractContextManager[None]]


async def answered(user: User, method: str, name: str, **request: Any) -> dict[str, Any]:
    """The answer, asked for until there is one: an outage is a 503, and nothing else."""

    async def ask() -> httpx.Response | None:
        response = await user.http.request(method, user.url(name), **request)
        assert response.status_code in (200, 202, 503), response.text
        return response if response.is_success else None

    answer: dict[str, Any] = (await until(ask, f"{name} is answered", PATIENCE)).json()
    return answer


class Typist:
    """Somebody who sends one command after the other, each until it is known to be recorded."""

    def __init__(self, user: User, session: str) -> None:
        self._user = user
        self._session = session
        self.sent: list[str] = []
        self._stopped = asyncio.Event()

    async def type(self) -> None:
        """Until stopped."""
        while not self._stopped.is_set():
            number = len(self.sent)
            self.sent.append(new_id())
            await self._insist(self.sent[-1], f"echo {number} >> log")

    def stop(self) -> None:
        """After the command under way."""
        self._stopped.set()

    async def _insist(self, command: str, text: str) -> None:
        """An event that was accepted is lost with a Pub/Sub that forgets: the same command is sent again."""
        body = {"sessionId": self._session, "command": text, "commandId": command}
        async with asyncio.timeout(PATIENCE):
            while True:
                await answered(self._user, "POST", "execute-command", json=body)
                with suppress(AssertionError):
                    await until(lambda: find(self._user, self._session, command), "it is recorded", RESEND_SECONDS)
                    return

    async def check(self) -> None:
        """All have run, once and in order."""
        for command in self.sent:
            assert (await ended(self._user, self._session, command))["exitCode"] == 0
        expected = b"".join(b"%d\r\n" % number for number in range(len(self.sent)))
        record = await run(self._user, self._session, "cat log")
        assert await self._user.read(self._session, record["startOffset"], record["endOffset"]) == expected


async def find(user: User, session: str, command: str) -> dict[str, Any] | None:
    """A command's record, looked for from the newest on."""
    after = 0
    while page := (await answered(user, "GET", f"list-commands/{session}", params={"after": after}))["commands"]:
        for entry in page:
            if entry["commandId"] == command:
                found: dict[str, Any] = entry
                return found
        after = page[-1]["number"]
    return None


async def ended(user: User, session: str, command: str) -> dict[str, Any]:
    """The record of a command that has its end."""

    async def look() -> dict[str, Any] | None:
        record = await find(user, session, command)
        return record if record is not None and record["state"] in ("exited", "killed", "lost") else None

    return await until(look, f"command {command} has an end", PATIENCE)


async def run(user: User, session: str, text: str) -> dict[str, Any]:
    """A command from its submission to its end."""
    command = new_id()
    await answered(user, "POST", "execute-command", json={"sessionId": session, "command": text, "commandId": command})
    return await ended(user, session, command)


async def ready(user: User) -> str:
    """A session whose shell runs."""
    session = await user.create()

    async def is_ready() -> bool:
        return bool((await answered(user, "GET", f"get-status/{session}"))["state"] == "ready")

    await until(is_ready, "the session is ready", PATIENCE)
    return session


async def work_goes_on(user: User, through: Callable[[], Awaitable[None]]) -> None:
    """One session prints and another takes commands through a bad time; both transcripts are exact."""
    printing, typing = await ready(user), await ready(user)
    command = new_id()
    body = {"sessionId": printing, "command": PRINTING, "commandId": command}
    await answered(user, "POST", "execute-command", json=body)
    await user.until_output(printing, b"line 20\r\n")
    typist = Typist(user, typing)
    async with asyncio.TaskGroup() as group:
        group.create_task(typist.type())
        await until(lambda: _typed(typist, 5), "some commands are sent")
        await through()
        seen = len(typist.sent)
        await until(lambda: _typed(typist, seen + 5), "commands are taken again", PATIENCE)
        typist.stop()
    record = await ended(user, printing, command)
    assert (record["state"], record["exitCode"]) == ("exited", 0)
    output = await user.read(printing, record["startOffset"], record["endOffset"])
    assert output == PRINTED
    again = await run(user, printing, "cat runs")
    assert await user.read(printing, again["startOffset"], again["endOffset"]) == b"ran\r\n"
    await typist.check()


async def _typed(typist: Typist, count: int) -> bool:
    return len(typist.sent) > count


@asynccontextmanager
async def stack(make: MakeStack, project: str, pubsub: str, firestore: str, **limits: object) -> AsyncIterator[Stack]:
    """A whole stack on these emulators, ended before they are."""
    whole = make(
        PIGEON_PROFILE="emulators",
        PIGEON_PROJECT=project,
        PUBSUB_EMULATOR_HOST=pubsub,
        FIRESTORE_EMULATOR_HOST=firestore,
        PIGEON_TICK_SECONDS="1",
        PIGEON_LIMITS=json.dumps({"pool_size": 0, **limits}),
    )
    await whole.start()
    try:
        yield whole
    finally:
        await whole.stop()


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

        async def through() -> None:
            with outage():
                await asyncio.sleep(OUTAGE_SECONDS)

        async with whole.user() as alice:
            await work_goes_on(alice, through)


async def test_a_pubsub_that_forgot_everything_costs_no_output(
    make_stack: MakeStack, project: str, firestore_host: str
) -> None:
    """kill -9 and a new one: topics and subscriptions are there again by themselves, the sweep has every session
    tended, and who sends a command again that was lost on the way has it run once."""
    times = {"tended_every": 1, "tended_stale": 5, "request_timeout": 5}
    async with machine(PUBSUB) as own, stack(make_stack, project, own.host, firestore_host, **times) as whole:

        async def through() -> None:
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
    limits = {"orphan_grace": 2, "tended_every": 1}
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
