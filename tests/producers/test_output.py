"""The transcript as text, polled."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from schemas.documents import Cursor, cursor_path, session_path
from schemas.ids import SessionId
from schemas.lifecycle import SessionState
from schemas.limits import MAX_CHUNK_BYTES, MAX_POLL_BYTES
from tests.producers.world import World, authorization, served
from tests.waiting import until


async def poll(client: httpx.AsyncClient, session: str, **body: Any) -> dict[str, Any]:
    response = await client.post("/terminal-get-output", json={"sessionId": session, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.fixture
async def session(world: World) -> SessionId:
    """A session that has printed twelve bytes in two chunks."""
    name = await world.session()
    await world.print(session_path(name), 0, b"hello ")
    await world.print(session_path(name), 6, b"world\n")
    return name


async def test_a_cursor_reads_on_where_it_left_off(alice: httpx.AsyncClient, world: World, session: SessionId) -> None:
    """The answer to a repeated poll is the same: nothing is lost if an answer is."""
    answer = await poll(alice, session, cursor=0)
    assert answer == {"output": "hello world\n", "cursor": 12, "ended": False}
    assert await poll(alice, session, cursor=0) == answer
    assert await poll(alice, session, cursor=12) == {"output": "", "cursor": 12, "ended": False}
    await world.print(session_path(session), 12, b"again\n")
    assert await poll(alice, session, cursor=12) == {"output": "again\n", "cursor": 18, "ended": False}


@pytest.mark.parametrize(("cursor", "output"), [(1, "ello world\n"), (6, "world\n"), (8, "rld\n"), (500, "")])
async def test_a_cursor_may_stand_anywhere(
    alice: httpx.AsyncClient, session: SessionId, cursor: int, output: str
) -> None:
    """Inside a chunk, at its edge, or where nothing was printed yet."""
    answer = await poll(alice, session, cursor=cursor)
    assert (answer["output"], answer["ended"]) == (output, False)
    assert answer["cursor"] == max(12, cursor)


async def test_without_a_cursor_each_poll_returns_what_is_new(
    alice: httpx.AsyncClient, world: World, session: SessionId
) -> None:
    """The old client keeps none, so one is kept for it."""
    assert (await poll(alice, session))["output"] == "hello world\n"
    assert (await poll(alice, session))["output"] == ""
    await world.print(session_path(session), 12, b"again\n")
    assert (await poll(alice, session))["output"] == "again\n"
    assert (await world.stored(Cursor, cursor_path(session, "alice"))).offset == 18


async def test_each_caller_has_a_cursor_of_their_own(
    alice: httpx.AsyncClient, world: World, session: SessionId
) -> None:
    """An administrator who looks takes nothing away from the owner."""
    async with world.client("root", admin=True) as admin:
        assert (await poll(admin, session))["output"] == "hello world\n"
    assert (await poll(alice, session))["output"] == "hello world\n"


async def test_polls_at_the_same_time_share_the_output(
    alice: httpx.AsyncClient, world: World, session: SessionId
) -> None:
    """Two tabs of the old client each get a part, and no part twice: the cursor moves by compare-and-set."""
    answers = await asyncio.gather(*(poll(alice, session) for _ in range(4)))
    assert sorted(answer["output"] for answer in answers) == ["", "", "", "hello world\n"]


async def test_ended_is_said_only_with_the_last_byte(alice: httpx.AsyncClient, world: World) -> None:
    """A client stops polling at `ended`; what it has not got by then it never gets."""
    name = await world.session()
    end = 0
    for _ in range(6):
        end = await world.print(session_path(name), end, b"x" * MAX_CHUNK_BYTES)
    await world.end(name, end)
    first = await poll(alice, name, cursor=0)
    assert (len(first["output"]), first["ended"]) == (MAX_POLL_BYTES, False)
    second = await poll(alice, name, cursor=first["cursor"])
    assert (second["cursor"], second["ended"]) == (end, True)


@pytest.mark.parametrize("final", [7, None])
async def test_a_session_that_has_ended_ends_where_its_transcript_does(
    alice: httpx.AsyncClient, world: World, final: int | None
) -> None:
    """A started character is flushed; a session without a recorded end has its last chunk's."""
    name = await world.session()
    await world.print(session_path(name), 0, b"hello \xe2")
    assert await poll(alice, name, cursor=0) == {"output": "hello ", "cursor": 6, "ended": False}
    await world.end(name, final, SessionState.LOST)
    assert await poll(alice, name, cursor=6) == {"output": "\N{REPLACEMENT CHARACTER}", "cursor": 7, "ended": True}
    response = await alice.post("/terminal-get-output", json={"sessionId": name, "cursor": 8})
    assert (response.status_code, response.json()["code"]) == (400, "malformed")


async def test_a_session_that_never_printed_ends_at_once(alice: httpx.AsyncClient, world: World) -> None:
    """It was closed while it waited."""
    name = await world.session(SessionState.CLOSED)
    assert await poll(alice, name, wait=25) == {"output": "", "cursor": 0, "ended": True}


async def test_missing_output_is_said_in_the_text(alice: httpx.AsyncClient, world: World) -> None:
    """Old clients read text only; silence about lost bytes would be a lie."""
    name = await world.session()
    await world.print(session_path(name), 0, b"abc")
    await world.give_up(session_path(name), 3, 100, "output_budget")
    await world.give_up(session_path(name), 103, None, "evicted")
    await world.end(name, 103, SessionState.LOST)
    answer = await poll(alice, name)
    assert "[100 bytes of output are missing here: output_budget]" in answer["output"]
    assert "[an unknown number of bytes of output are missing here: evicted]" in answer["output"]
    assert (answer["cursor"], answer["ended"]) == (103, True)


async def test_chunks_that_have_expired_do_not_keep_a_reader_waiting(alice: httpx.AsyncClient, world: World) -> None:
    """The end is reached, with a word about what is missing."""
    name = await world.session()
    await world.end(name, 1000)
    answer = await poll(alice, name)
    assert "1000 bytes of output are missing" in answer["output"]
    assert (answer["cursor"], answer["ended"]) == (1000, True)


async def test_waiting_ends_with_the_first_output(alice: httpx.AsyncClient, world: World, session: SessionId) -> None:
    """A long poll is answered when there is something to say; a character that has only begun is not yet."""
    polling = asyncio.create_task(poll(alice, session, cursor=12, wait=25))
    await world.clock.slept_on()
    await world.print(session_path(session), 12, b"\xe2\x82")
    await world.print(session_path(session), 14, b"\xac")
    async with asyncio.timeout(10):
        assert await polling == {"output": "€", "cursor": 15, "ended": False}
    assert (world.store.listeners, world.clock.sleepers) == (0, 0)


async def test_waiting_ends_with_the_session(alice: httpx.AsyncClient, world: World, session: SessionId) -> None:
    """Nothing more will come."""
    polling = asyncio.create_task(poll(alice, session, cursor=12, wait=25))
    await world.clock.slept_on()
    await world.end(session, 12)
    async with asyncio.timeout(10):
        assert await polling == {"output": "", "cursor": 12, "ended": True}


async def test_waiting_ends_in_time(alice: httpx.AsyncClient, world: World, session: SessionId) -> None:
    """However long a client wants to wait, gateways and functions do not."""
    polling = asyncio.create_task(poll(alice, session, wait=1e9, cursor=12))
    await world.clock.slept_on()
    world.clock.advance(25)
    async with asyncio.timeout(10):
        assert await polling == {"output": "", "cursor": 12, "ended": False}
    assert (world.store.listeners, world.clock.sleepers) == (0, 0)


async def test_two_waiting_polls_share_one_wait(alice: httpx.AsyncClient, world: World, session: SessionId) -> None:
    """The poll that another one overtook goes on waiting for what is left of its time, not for the whole again."""
    await poll(alice, session)
    polls = [asyncio.create_task(poll(alice, session, wait=25)) for _ in range(2)]
    await world.clock.slept_on(2)
    world.clock.advance(20)
    await world.print(session_path(session), 12, b"x")
    async with asyncio.timeout(10):
        await asyncio.wait(polls, return_when=asyncio.FIRST_COMPLETED)
        await world.clock.slept_on()
        world.clock.advance(5)
        assert sorted([(await task)["output"] for task in polls]) == ["", "x"]


@pytest.mark.parametrize("function", ["get-output", "read-file"])
async def test_nothing_waits_for_a_client_that_went_away(world: World, session: SessionId, function: str) -> None:
    """Closing a tab ends its long poll and its read, and with them what they listen to."""
    request = {
        "get-output": ("POST", "/terminal-get-output", {"sessionId": session, "cursor": 12, "wait": 25}),
        "read-file": ("GET", f"/terminal-read-file/{session}?path=a.py", None),
    }
    method, path, body = request[function]
    async with served(world.app) as address, httpx.AsyncClient(trust_env=False, headers=authorization()) as client:
        waiting = asyncio.create_task(client.request(method, address + path, json=body))
        await world.clock.slept_on()
        waiting.cancel()

        async def look() -> bool:
            return world.store.listeners == world.clock.sleepers == 0

        await until(look, "nobody listens")


async def test_many_small_chunks_are_not_one_query_each(alice: httpx.AsyncClient, world: World) -> None:
    """A person typing makes thousands of them; a page of text must not cost a thousand reads' time."""
    name = await world.session()
    for offset in range(200):
        await world.print(session_path(name), offset, b"x")
    world.store.queries = 0
    assert (await poll(alice, name, cursor=0))["output"] == "x" * 200
    assert world.store.queries < 12


async def test_a_wait_without_end_is_refused(alice: httpx.AsyncClient, session: SessionId) -> None:
    """1e400 is a number in JSON and infinity in Python."""
    content = b'{"sessionId": "%b", "cursor": 12, "wait": 1e400}' % session.encode()
    headers = {"content-type": "application/json"}
    assert (await alice.post("/terminal-get-output", content=content, headers=headers)).status_code == 400


@pytest.mark.parametrize(
    "wrong",
    [{"cursor": -1}, {"cursor": "0"}, {"cursor": 1.5}, {"cursor": 10**15}, {"wait": -1}, {"wait": "1"}, {"wait": None}],
)
async def test_a_cursor_or_wait_that_is_no_number_is_refused(
    alice: httpx.AsyncClient, session: SessionId, wrong: dict[str, Any]
) -> None:
    """Reading the wrong bytes silently would be worse."""
    response = await alice.post("/terminal-get-output", json={"sessionId": session, **wrong})
    assert (response.status_code, response.json()["code"]) == (400, "malformed")
