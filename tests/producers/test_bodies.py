"""Bodies that are not what they should be never become an event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from schemas.functions import Function
from schemas.limits import MAX_BODY_BYTES
from tests.producers.calls import WITH_BODY, call, check
from tests.producers.world import World, authorization, served

WRONG_BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b"{} {}",
    b'{"a": 1, "a": 2}',
    b'{"x": {"a": 1, "a": 2}}',
    b'{"x": NaN}',
    b'{"x": -Infinity}',
    b'{"x": "\xff"}',
    b'\xef\xbb\xbf{"x": 1}',
    b'{"x": "\\ud800"}',
    b'{"\\uDC00": 1}',
    b"[" * 100_000,
    b'{"x": ' + b"9" * 5000 + b"}",
    b"sessionId=x",
]


@pytest.mark.parametrize("function", WITH_BODY)
@pytest.mark.parametrize("body", WRONG_BODIES, ids=lambda body: repr(body[:24]))
async def test_a_body_that_is_no_strict_json_object_is_refused(
    alice: httpx.AsyncClient, world: World, function: Function, body: bytes
) -> None:
    """Two readers of sloppy JSON may read two things."""
    headers = {"content-type": "application/json"}
    check(await call(alice, function, content=body, headers=headers), 400, "malformed")
    assert world.events == []


@pytest.mark.parametrize("function", WITH_BODY)
@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/json; charset=latin-1", "application/json2", "multipart/form-data"]
)
async def test_a_body_of_another_type_is_refused(
    alice: httpx.AsyncClient, world: World, function: Function, content_type: str
) -> None:
    """A plain form of a foreign page can send text/plain without a preflight; it gets nowhere."""
    headers = {"content-type": content_type} if content_type else {}
    check(await call(alice, function, content=b"{}", headers=headers), 415, "unsupported_media_type")
    assert world.events == []


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"'])
async def test_json_in_utf_8_is_taken_however_it_is_spelt(alice: httpx.AsyncClient, content_type: str) -> None:
    """Media types have no case."""
    headers = {"content-type": content_type}
    assert (await alice.post("/terminal-create-session", content=b"{}", headers=headers)).status_code == 202


@pytest.mark.parametrize("function", WITH_BODY)
async def test_fields_of_wrong_types_are_named(alice: httpx.AsyncClient, world: World, function: Function) -> None:
    """No coercion: "24" is no number and 1 is no flag."""
    wrong = {
        "sessionId": 7,
        "reconnect": "true",
        "rows": "24",
        "cols": 1.5,
        "command": ["ls"],
        "fileStructure": {},
        "signal": "HUP",
        "text": 5,
        "requestId": "a b",
    }
    problem = check(await call(alice, function, json=wrong), 400, "malformed")
    assert problem.errors
    assert world.events == []


@pytest.mark.parametrize("function", WITH_BODY)
async def test_a_huge_body_is_refused_before_it_is_read(
    alice: httpx.AsyncClient, world: World, function: Function
) -> None:
    """By what it declares, or, if it declares nothing, as soon as it is too long."""
    headers = {"content-type": "application/json"}
    body = b'{"x": "' + b"x" * MAX_BODY_BYTES + b'"}'
    check(await call(alice, function, content=body, headers=headers), 413, "too_large")
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"x" * 1_000_000

    check(await call(alice, function, content=endless(), headers=headers), 413, "too_large")
    assert taken < 12
    assert world.events == []


async def test_a_body_of_a_hundred_thousand_mistakes_is_refused_for_the_first(alice: httpx.AsyncClient) -> None:
    """Naming every one takes fifty bytes of answer and a kilobyte of memory for each byte sent, and half a minute."""
    body = {"sessionId": "s" + "a" * 25, "fileStructure": [1] * 100_000}
    problem = check(await alice.post("/terminal-sync-files", json=body), 400, "malformed")
    assert [error.field for error in problem.errors or ()] == ["fileStructure.0"]


@pytest.mark.parametrize("declared", [True, False])
async def test_a_client_that_sends_a_huge_body_hears_why_it_was_refused(world: World, declared: bool) -> None:
    """Through a real server, which has to answer before it has read everything."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 1_000_000

    content: Any = b"x" * 40_000_000 if declared else pieces()
    headers = {**authorization(), "content-type": "application/json"}
    async with served(world.app) as address, httpx.AsyncClient(trust_env=False) as client:
        response = await client.post(f"{address}/terminal-create-session", content=content, headers=headers)
    check(response, 413, "too_large")


async def test_a_client_that_goes_away_while_it_sends_changes_nothing(world: World) -> None:
    """Half a body is no body."""
    async with served(world.app) as address:
        host, port = address.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /terminal-create-session HTTP/1.1\r\nHost: x\r\nAuthorization: {authorization()['authorization']}"
        writer.write(f"{head}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{}}".encode())
        await writer.drain()
        writer.close()
        assert await reader.read() == b""
    assert world.events == []
