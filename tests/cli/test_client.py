"""The client against servers that go away, answer nonsense, or refuse."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from infra import client as client_module
from infra.client import CallFailed, Client, Unreachable
from schemas.http import StreamedData, StreamedEnd, problem

SESSION = "s" + "a" * 25


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once."""
    monkeypatch.setattr(client_module, "backoff", lambda attempt: 0.0)


@asynccontextmanager
async def client_of(handler: Callable[[Request], Response]) -> AsyncIterator[Client]:
    """A client of a server that answers everything with `handler`."""

    async def answer(request: Request) -> Response:
        return handler(request)

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST", "DELETE"])])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
        yield Client(http)


def message(offset: int, data: bytes) -> bytes:
    body = json.dumps({"offset": offset, "data": base64.b64encode(data).decode()})
    return f"id: {offset + len(data)}\ndata: {body}\n\n".encode()


async def collect(client: Client) -> tuple[bytes, int | None]:
    """All bytes of a stream, each at its offset, and where it ended."""
    data, end = b"", None
    async with aclosing(client.stream(SESSION)) as items:
        async for item in items:
            if isinstance(item, StreamedData):
                assert item.offset == len(data)
                data += item.data
            elif isinstance(item, StreamedEnd):
                end = item.final_offset
    return data, end


async def test_a_stream_that_breaks_is_picked_up_where_it_broke() -> None:
    """Every byte once, whatever was cut: between events, within one, or with a problem in the stream."""
    text = b"every byte, once and in order"
    cuts: list[str] = []

    def serve(request: Request) -> Response:
        position = int(request.headers["last-event-id"])
        cuts.append(request.headers["last-event-id"])
        if position >= len(text):
            return StreamingResponse(iter([b'event: end\ndata: {"finalOffset": %d}\n\n' % len(text)]))
        piece = message(position, text[position : position + 3])
        half = message(position + 3, text[position + 3 :])[:-4]
        trouble = problem("store_unavailable", "later").model_dump_json(by_alias=True)
        ends = [half, f"event: problem\ndata: {trouble}\n\n".encode(), b": keep-alive\n\n"]
        return StreamingResponse(iter([piece, ends[position % 3]]))

    async with client_of(serve) as client:
        assert await collect(client) == (text, len(text))
    assert cuts == [str(offset) for offset in range(0, len(text), 3)] + [str(len(text))]


async def test_a_stream_that_was_quiet_for_long_is_picked_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle session says nothing for hours; how long ago it last did is not how long its server is away."""
    loop = asyncio.get_running_loop()
    asked = 0

    async def quiet() -> AsyncIterator[bytes]:
        yield message(0, b"hi")
        later = loop.time() + 3600.0
        monkeypatch.setattr(loop, "time", lambda: later)
        raise httpx.ReadError("cut")

    def serve(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        if asked == 3:
            return httpx.Response(503, content=problem("unavailable", "closing").model_dump_json(by_alias=True))
        rest = message(2, b"!") + b'event: end\ndata: {"finalOffset": 3}\n\n'
        return httpx.Response(200, content=quiet() if asked == 1 else b"" if asked == 2 else rest)

    async with httpx.AsyncClient(transport=httpx.MockTransport(serve), base_url="http://server") as http:
        assert await collect(Client(http)) == (b"hi!", 3)


async def test_a_server_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying again has an end, and the error says what the last try met."""
    now = asyncio.get_running_loop().time()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    asked = 0

    def refuse(request: Request) -> Response:
        nonlocal asked, now
        asked += 1
        now += 12.0  # what each try takes
        return Response(problem("store_unavailable", "later").model_dump_json(by_alias=True), 503)

    async with client_of(refuse) as client:
        with pytest.raises(CallFailed) as caught:
            await collect(client)
    assert (caught.value.code, asked) == ("store_unavailable", 4)


async def test_a_stream_that_is_refused_is_not_tried_again() -> None:
    """Somebody else's session stays unknown however often one asks."""
    asked = 0

    def refuse(request: Request) -> Response:
        nonlocal asked
        asked += 1
        return Response(problem("unknown_session", "no such session").model_dump_json(by_alias=True), 404)

    async with client_of(refuse) as client:
        with pytest.raises(CallFailed) as caught:
            await collect(client)
    assert (caught.value.code, asked) == ("unknown_session", 1)


async def test_a_call_is_repeated_under_the_same_key() -> None:
    """A server that stumbles gets the same request again, so that it counts once."""
    keys: list[str] = []

    async def stumble(request: Request) -> Response:
        keys.append((await request.json())["requestId"])
        if len(keys) < 3:
            return Response(problem("store_unavailable", "later").model_dump_json(by_alias=True), 503)
        return JSONResponse({"success": True})

    app = Starlette(routes=[Route("/terminal-send-input", stumble, methods=["POST"])])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
        await Client(http).send_input(SESSION, b"x")
    assert (len(keys), len(set(keys))) == (3, 1)


async def test_a_limit_is_said_at_once() -> None:
    """Too many sessions is an answer for a person, not something to wait for."""

    def full(request: Request) -> Response:
        document = problem("limit_reached", "at most 5", retry_after=30)
        return Response(document.model_dump_json(by_alias=True), 429)

    async with client_of(full) as client:
        with pytest.raises(CallFailed, match="at most 5") as caught:
            await client.create()
    assert (caught.value.code, caught.value.retry_after) == ("limit_reached", 30.0)


@pytest.mark.parametrize(
    "answer", [PlainTextResponse("no", 404), JSONResponse([], 404), JSONResponse({"code": 1}, 404)]
)
async def test_an_answer_that_is_not_ours_is_an_error_with_a_code(answer: Response) -> None:
    """Another program on that port, or a proxy in between, is told apart from our refusals."""
    async with client_of(lambda request: answer) as client:
        with pytest.raises(CallFailed) as caught:
            await client.status(SESSION)
    assert (caught.value.code, caught.value.status) == ("unexpected_answer", 404)


async def test_a_success_that_is_not_ours_is_an_error_too() -> None:
    """A page of HTML with status 200 is no session."""
    async with client_of(lambda request: PlainTextResponse("<!doctype html>")) as client:
        with pytest.raises(CallFailed) as caught:
            await client.status(SESSION)
    assert caught.value.code == "unexpected_answer"


async def test_a_server_that_is_not_there_is_unreachable() -> None:
    """The error names the address; it does not hang."""
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        with pytest.raises(Unreachable, match=f"127.0.0.1:{port}"):
            await Client(http).sessions()


async def test_the_end_of_a_command_is_seen_however_many_came_before_it() -> None:
    """A page of commands at a time, and a page that does not have it is not read again."""
    asked: list[int] = []

    def serve(request: Request) -> Response:
        after = int(request.query_params["after"])
        asked.append(after)
        state = "running" if len(asked) < 5 else "exited"
        return JSONResponse({"commands": [command(number, state) for number in range(after + 1, 51)[:20]]})

    async with client_of(serve) as client:
        record = await client.ended(SESSION, "c50")
    assert (record.number, record.state) == (50, "exited")
    assert asked == [0, 20, 40, 40, 40]


async def test_a_command_is_waited_for_through_a_restart_of_the_server() -> None:
    """A script that runs for an hour is not given up, and its session closed, for a server that is away for seconds."""
    asked = 0

    def serve(request: Request) -> Response:
        nonlocal asked
        asked += 1
        if asked < 3 * client_module.TRIES:
            return Response(problem("unavailable", "starting").model_dump_json(by_alias=True), 503)
        return JSONResponse({"commands": [command(1, "exited")]})

    async with client_of(serve) as client:
        assert (await client.ended(SESSION, "c1")).state == "exited"


async def test_a_command_of_a_server_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting has an end, and a refusal ends it at once."""
    loop = asyncio.get_running_loop()
    now = loop.time()
    monkeypatch.setattr(loop, "time", lambda: now)
    codes = ["unavailable", "unknown_session"]

    def refuse(request: Request) -> Response:
        nonlocal now
        now += 5.0
        document = problem(codes[0], "no")
        return Response(document.model_dump_json(by_alias=True), document.status)

    async with client_of(refuse) as client:
        while codes:
            with pytest.raises(CallFailed) as caught:
                await client.ended(SESSION, "c1")
            assert caught.value.code == codes.pop(0)


async def test_every_session_is_listed_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page at a time, each from where the one before it ended."""
    asked: list[tuple[str | None, str | None]] = []

    def serve(request: Request) -> Response:
        asked.append((request.query_params.get("live"), request.query_params.get("before")))
        first = 0 if asked[-1][1] is None else 60 - int(asked[-1][1][-3:-1])
        return JSONResponse({"sessions": [session(59 - number) for number in range(first, 60)[:25]]})

    monkeypatch.setattr(client_module, "PAGE", 25)
    async with client_of(serve) as client:
        listed = await client.sessions(live=True)
    assert [status.created_at.second for status in listed] == list(range(59, -1, -1))
    assert asked == [("true", None), ("true", "2026-01-01T00:00:35Z"), ("true", "2026-01-01T00:00:10Z")]


def session(second: int) -> dict[str, object]:
    moment = f"2026-01-01T00:00:{second:02}Z"
    return {
        "sessionId": SESSION,
        "status": "ready",
        "state": "ready",
        "reason": "",
        "podName": "",
        "position": None,
        "warning": None,
        "rows": 24,
        "cols": 80,
        "createdAt": moment,
        "readyAt": None,
        "lastActivityAt": moment,
        "expiresAt": moment,
        "endedAt": None,
        "finalOffset": None,
        "usage": {},
    }


def command(number: int, state: str) -> dict[str, object]:
    return {
        "commandId": f"c{number}",
        "number": number,
        "command": "true",
        "state": state,
        "reason": "",
        "cwd": "",
        "exitCode": None,
        "startOffset": None,
        "endOffset": None,
        "seconds": None,
        "changedFiles": [],
        "changedFilesTruncated": False,
        "endedAt": None,
        "submittedAt": "2026-01-01T00:00:00Z",
    }
