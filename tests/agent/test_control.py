"""The worker's control connection to an agent, while nobody asks anything."""

from __future__ import annotations

import asyncio

import pytest

import consumers.agent.agent as wire
from consumers.agent import client
from schemas.errors import AgentUnreachable
from schemas.ports import ByteStream
from tests.contracts.waiting import soon

KEY = bytes(32).hex()
PINGS = 8  # at the patched pace, more than twice as long as silence may last


class Answering(ByteStream):
    """An agent's side that proves anything, and answers the first `answers` PINGs."""

    def __init__(self, answers: int) -> None:
        self._left = answers
        self._said: asyncio.Queue[bytes] = asyncio.Queue()
        greeting = {"bootId": "b", "challenge": "c", "opened": True}
        self._said.put_nowait(wire.encode_frame(wire.HELLO, 0, wire.encode_json(greeting)))
        self.answered = asyncio.Event()
        self.closed = False

    async def read(self, limit: int) -> bytes:
        """See the port."""
        return await self._said.get()

    async def write(self, data: bytes) -> None:
        """See the port."""
        kind, _, argument = wire.HEADER.unpack_from(data)
        if kind == wire.CONTROL:
            self._said.put_nowait(wire.encode_frame(wire.REPLY, 0, wire.encode_json({"ok": True})))
        elif kind == wire.PING and self._left:
            self._left -= 1
            self._said.put_nowait(wire.encode_frame(wire.PONG, argument))
            if not self._left:
                self.answered.set()

    async def close(self) -> None:
        """See the port."""
        self.closed = True


async def control(stream: ByteStream) -> client.AgentControl:
    """A proved control connection."""
    made = client.AgentControl(await client.connect(stream))
    await made.start(KEY)
    return made


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute is too long for a test."""
    monkeypatch.setattr(client, "KEEPALIVE_SECONDS", 0.5)
    monkeypatch.setattr(client, "SILENCE_SECONDS", 1.5)


async def test_a_connection_that_nobody_uses_stays_as_long_as_the_agent_answers() -> None:
    """The next key needs no new connection, which in a pod is a new exec, after however long a pause."""
    stream = Answering(PINGS)
    connection = await control(stream)
    await soon(stream.answered.wait())
    assert connection.alive
    await connection.close()


async def test_an_agent_that_answers_nothing_any_more_is_given_up() -> None:
    """A request that waits then is told so; it must not wait for ever."""
    connection = await control(Answering(1))
    with pytest.raises(AgentUnreachable, match="silent"):
        await soon(connection.request("status"))
    assert not connection.alive
    await connection.close()


async def test_a_connection_whose_closing_is_cancelled_is_closed_all_the_same() -> None:
    """By a worker that stops; in a pod it would be an exec that stays until the agent notices the silence."""
    stream = Answering(PINGS)
    connection = await control(stream)
    closing = asyncio.create_task(connection.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(closing)
    assert stream.closed
