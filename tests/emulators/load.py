"""People at work on a stack of processes on emulators, and what must be true of their sessions after a bad time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx

from schemas.ids import new_id
from tests.journeys.conftest import MakeStack
from tests.journeys.stack import ALL_ROLES, Stack, User
from tests.waiting import until

PATIENCE = 120.0
RESEND_SECONDS = 5.0
LINES, PAUSE_SECONDS = 700, 0.02  # of a program that prints all the while
PRINTING = f"echo ran >> runs; for i in $(seq 1 {LINES}); do echo line $i; sleep {PAUSE_SECONDS}; done; seq 1 200000"
PRINTED = b"".join(b"line %d\r\n" % n for n in range(1, LINES + 1)) + b"".join(b"%d\r\n" % n for n in range(1, 200_001))


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


async def work_goes_on(user: User, through: Callable[[str], Awaitable[None]]) -> None:
    """One session prints and another takes commands through a bad time, which is given the name of the first; both
    transcripts are exact, and every command has run once, in order."""
    printing, typing = await ready(user), await ready(user)
    command = new_id()
    body = {"sessionId": printing, "command": PRINTING, "commandId": command}
    await answered(user, "POST", "execute-command", json=body)
    await user.until_output(printing, b"line 20\r\n")
    typist = Typist(user, typing)
    async with asyncio.TaskGroup() as group:
        group.create_task(typist.type())
        await until(lambda: _typed(typist, 5), "some commands are sent")
        await through(printing)
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
async def stack(
    make: MakeStack, project: str, pubsub: str, firestore: str, *, roles: str = ALL_ROLES, **limits: object
) -> AsyncIterator[Stack]:
    """A stack on these emulators, ended before they are."""
    whole = make(
        PIGEON_PROFILE="emulators",
        PIGEON_PROJECT=project,
        PUBSUB_EMULATOR_HOST=pubsub,
        FIRESTORE_EMULATOR_HOST=firestore,
        PIGEON_TICK_SECONDS="1",
        PIGEON_LIMITS=json.dumps({"pool_size": 0, **limits}),
    )
    await whole.start(roles)
    try:
        yield whole
    finally:
        await whole.stop()
