"""The transcript as server-sent events, through a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from schemas.documents import session_path
from schemas.ids import SessionId
from schemas.lifecycle import SessionState
from schemas.limits import MAX_CHUNK_BYTES
from tests.producers.sse import Event, stream
from tests.producers.world import World, served
from tests.waiting import until


@pytest.fixture
async def address(world: World) -> AsyncIterator[str]:
    """A server of the functions."""
    async with served(world.app) as address:
        yield address


@pytest.fixture
async def session(world: World) -> SessionId:
    """A session that has printed twelve bytes in two chunks."""
    name = await world.session()
    await world.print(session_path(name), 0, b"hello ")
    await world.print(session_path(name), 6, b"world\n")
    return name


def transcript(events: list[Event]) -> bytes:
    return b"".join(event.bytes for event in events if event.type == "message")


async def quiet(world: World) -> None:
    """Return once nobody listens to the store and nobody sleeps on the clock."""

    async def look() -> bool:
        return world.store.listeners == world.clock.sleepers == 0

    await until(look, "nobody listens")


async def test_a_stream_begins_with_the_state_and_the_history(world: World, address: str, session: SessionId) -> None:
    """A page that opens it needs no other call; ids are the offsets to resume at."""
    async with stream(address, session) as events:
        assert events.response.headers["content-type"].startswith("text/event-stream")
        assert events.response.headers["cache-control"] == "no-store, no-transform"
        state = await events.next()
        assert (state.type, state.data["state"], state.id) == ("state", "ready", "")
        first, second = await events.next(), await events.next()
        assert (first.data["offset"], first.bytes, first.id) == (0, b"hello ", "6")
        assert (second.data["offset"], second.bytes, second.id) == (6, b"world\n", "12")
        await world.print(session_path(session), 12, b"!")
        assert (await events.next_of("message")).bytes == b"!"


async def test_a_stream_ends_with_the_transcript(world: World, address: str, session: SessionId) -> None:
    """The end says how long the transcript is, and comes after its last byte, whatever order news travel in."""
    async with stream(address, session) as events:
        await events.next()
        await world.print(session_path(session), 12, b"bye\n")
        await world.end(session, 16)
        rest = await events.rest()
    assert transcript(rest) == b"hello world\nbye\n"
    assert [event.data["state"] for event in rest if event.type == "state"] == ["closed"]
    assert (rest[-1].type, rest[-1].data) == ("end", {"finalOffset": 16})
    await quiet(world)


@pytest.mark.parametrize("final", [12, None])
async def test_an_ended_session_is_replayed(world: World, address: str, session: SessionId, final: int | None) -> None:
    """The transcript outlives its pod."""
    await world.end(session, final, SessionState.LOST)
    async with stream(address, session) as events:
        rest = await events.rest()
    assert [event.type for event in rest] == ["state", "message", "message", "end"]
    assert transcript(rest) == b"hello world\n"
    assert rest[-1].data == {"finalOffset": 12}


@pytest.mark.parametrize(("start", "expected"), [(0, b"hello world\n"), (3, b"lo world\n"), (6, b"world\n"), (12, b"")])
async def test_a_stream_starts_where_it_is_asked_to(
    world: World, address: str, session: SessionId, start: int, expected: bytes
) -> None:
    """Also inside a chunk, and at the very end."""
    await world.end(session, 12)
    async with stream(address, session, params={"from": start}) as events:
        rest = await events.rest()
    assert transcript(rest) == expected
    assert rest[-1].type == "end"


async def test_a_reconnecting_client_goes_on_after_the_last_event_it_saw(
    world: World, address: str, session: SessionId
) -> None:
    """Last-Event-ID wins over `from`, which a browser repeats as it was when it first connected."""
    async with stream(address, session, params={"from": 3}, last_event_id="8") as events:
        assert (await events.next_of("message")).data["offset"] == 8


async def test_a_live_stream_may_start_where_nothing_was_printed_yet(
    world: World, address: str, session: SessionId
) -> None:
    """What lies before is not sent."""
    async with stream(address, session, params={"from": 14}) as events:
        await events.next()
        await world.print(session_path(session), 12, b"abcd")
        message = await events.next_of("message")
        assert (message.data["offset"], message.bytes) == (14, b"cd")


@pytest.mark.parametrize("start", ["13", "-1", "x", "1.5", "1000000000000000", ""])
async def test_a_start_that_cannot_be_is_refused(world: World, address: str, session: SessionId, start: str) -> None:
    """Beyond the end of a complete transcript there is nothing to wait for."""
    await world.end(session, 12)
    async with world.client() as alice:
        response = await alice.get(f"/terminal-stream-output/{session}", params={"from": start})
        assert (response.status_code, response.json()["code"]) == (400, "malformed")
        headers = {"last-event-id": start or "y"}
        response = await alice.get(f"/terminal-stream-output/{session}", headers=headers)
        assert (response.status_code, response.json()["code"]) == (400, "malformed")


async def test_bytes_that_were_given_up_are_an_event(world: World, address: str) -> None:
    """The page shows a mark in their place, and a reconnect goes on behind it."""
    name = await world.session()
    await world.give_up(session_path(name), 0, 100, "output_budget")
    await world.print(session_path(name), 100, b"x")
    await world.give_up(session_path(name), 101, None, "evicted")
    await world.end(name, 101, SessionState.LOST)
    async with stream(address, name) as events:
        rest = await events.rest()
    gaps = [(event.id, event.data) for event in rest if event.type == "gap"]
    assert gaps == [
        ("100", {"offset": 0, "length": 100, "reason": "output_budget"}),
        ("101", {"offset": 101, "length": None, "reason": "evicted"}),
    ]


async def test_the_page_sees_every_state_that_matters(world: World, address: str) -> None:
    """Position in the queue, warning and end; but a heartbeat of the tender is no news."""
    name = await world.session(SessionState.QUEUED, position=2)
    async with stream(address, name) as events:
        assert (await events.next_of("state")).data["position"] == 2
        await world.change(name, position=1)
        assert (await events.next_of("state")).data["position"] == 1
        await world.change(name, tendedAt=world.clock.now(), lastActivityAt=world.clock.now())
        warning = world.clock.now() + timedelta(minutes=2)
        await world.change(name, state="ready", warning=warning)
        state = (await events.next_of("state")).data
        assert (state["state"], state["warning"]) == ("ready", "2026-11-02T12:02:00Z")


async def test_a_silent_stream_says_that_it_lives(world: World, address: str, session: SessionId) -> None:
    """Proxies cut connections on which nothing moves."""
    async with stream(address, session, params={"from": 12}) as events:
        await events.next()
        for _ in range(2):
            await world.clock.slept_on()
            world.clock.advance(15)
            assert (await events.next()).type == "comment"


@pytest.mark.parametrize("moment", ["at once", "after the history"])
async def test_nothing_is_left_of_a_client_that_goes_away(
    world: World, address: str, session: SessionId, moment: str
) -> None:
    """Its listeners end at once, not with the next byte: an abandoned listener is billed for every write."""
    before = asyncio.all_tasks()
    async with stream(address, session) as events:
        await events.next()
        if moment == "after the history":
            await events.next_of("message")
            await world.clock.slept_on()
            assert world.store.listeners == 2
    await quiet(world)

    async def look() -> bool:
        return asyncio.all_tasks() <= before

    await until(look, "no task is left")


async def test_a_client_that_does_not_read_holds_up_only_itself(world: World, address: str) -> None:
    """What is sent to it waits in bounded memory, and another reader is not delayed."""
    name = await world.session()
    end = 0
    for _ in range(64):
        end = await world.print(session_path(name), end, bytes(MAX_CHUNK_BYTES))
    async with stream(address, name):
        async with stream(address, name) as reading:
            seen = 0
            while seen < end:
                seen += len((await reading.next_of("message")).bytes)
        await world.end(name, end)
    await quiet(world)


async def test_a_stream_that_breaks_off_does_not_say_end(world: World, address: str, session: SessionId) -> None:
    """The client reconnects; what it is told is the code, not the server's innards."""
    async with stream(address, session, params={"from": 12}) as events:
        await events.next()
        await world.clock.slept_on()
        world.store.listening_fails = True
        await world.print(session_path(session), 12, b"x")
        rest = await events.rest()
    assert rest[-1].type == "problem"
    assert (rest[-1].data["code"], "disk" in rest[-1].data["detail"]) == ("store_unavailable", False)
    await quiet(world)


async def test_a_stream_is_refused_like_any_call(world: World, session: SessionId) -> None:
    """Before the first byte an error is still a problem document."""
    async with world.client("bob") as bob:
        response = await bob.get(f"/terminal-stream-output/{session}")
        assert (response.status_code, response.json()["code"]) == (404, "unknown_session")
        response = await bob.get(f"/terminal-stream-output/{session}", headers={"authorization": "Bearer x"})
        assert response.status_code == 401


async def test_pages_of_a_long_transcript_arrive_whole(world: World, address: str) -> None:
    """Large and small chunks, live and replayed, byte for byte."""
    name = await world.session()
    contents = [bytes([number]) * size for number, size in enumerate([1, 3, MAX_CHUNK_BYTES, 7, 200_000, 1] * 6)]
    end = 0
    async with stream(address, name) as events:
        for content in contents:
            end = await world.print(session_path(name), end, content)
        await world.end(name, end)
        live = await events.rest()
    async with stream(address, name, params={"from": 2}) as events:
        replayed = await events.rest()
    assert transcript(live) == b"".join(contents)
    assert transcript(replayed) == b"".join(contents)[2:]
