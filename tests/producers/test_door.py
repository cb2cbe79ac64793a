"""What every function refuses, and that a refusal says nothing on any topic."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from producers.identity import sign_local_token
from producers.routes import WORK, routes
from schemas.documents import ROLLOUT_PATH, Rollout
from schemas.functions import FUNCTIONS, Function
from schemas.http import PROBLEMS, Problem
from schemas.ids import SessionId
from schemas.lifecycle import ENDED, SessionState
from schemas.limits import MAX_BODY_BYTES, MAX_TOKEN_BYTES
from tests.producers.world import ORIGIN, SECRET, World, authorization, served

BODIES: dict[str, dict[str, Any]] = {
    "terminal-execute-command": {"command": "ls"},
    "terminal-get-output": {"cursor": 0},
    "terminal-send-input": {"text": "x"},
    "terminal-resize": {"rows": 24, "cols": 80},
    "terminal-signal": {"signal": "INT"},
    "terminal-sync-files": {"fileStructure": [{"path": "a.py", "type": "file", "content": "1"}]},
}
QUERIES = {"terminal-read-file": {"path": "a.py"}}
ALL = [pytest.param(function, id=function.name) for function in FUNCTIONS.values()]
WITH_BODY = [pytest.param(function, id=function.name) for function in FUNCTIONS.values() if function.request]
OF_A_SESSION = [
    pytest.param(function, id=function.name)
    for function in FUNCTIONS.values()
    if function.by_session or function.name in BODIES
]
ACTING = [
    pytest.param(FUNCTIONS[name], id=name)
    for name in (*(name for name in BODIES if name != "terminal-get-output"), "terminal-list-files", *QUERIES)
]


async def call(
    client: httpx.AsyncClient, function: Function, session: str = "s" + "a" * 25, **arguments: Any
) -> httpx.Response:
    """Call a function properly, but for what `arguments` say."""
    path = f"/{function.name}/{session}" if function.by_session else f"/{function.name}"
    if function.request is not None and not {"content", "json"} & arguments.keys():
        arguments["json"] = {"sessionId": session, **BODIES.get(function.name, {})}
    arguments.setdefault("params", QUERIES.get(function.name))
    return await client.request(arguments.pop("method", function.method), path, **arguments)


def check(response: httpx.Response, status: int, code: str) -> Problem:
    """Assert that this is the problem document of that code."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    problem = Problem.model_validate_json(response.content)
    assert (problem.status, problem.code, problem.type) == (status, code, f"urn:problem-type:pigeon:{code}")
    assert problem.title == PROBLEMS[code][1]
    assert response.headers["cache-control"] == "no-store"
    return problem


@pytest.fixture
async def anyone(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """Somebody without a token."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(world.app), base_url="http://functions") as client:
        yield client


def test_every_declared_function_is_there(world: World) -> None:
    """The routes, the OpenAPI document and the deployed targets are one list."""
    assert WORK.keys() == FUNCTIONS.keys() == routes(world.services).keys()


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize(
    "authorization_header",
    ["", "Bearer", "Bearer ", "Basic YTpi", "bearer x.y.z", "Bearer " + "x" * (MAX_TOKEN_BYTES + 1)],
    ids=["none", "no token", "empty", "basic", "garbage", "huge"],
)
async def test_nobody_gets_in_without_a_token(
    anyone: httpx.AsyncClient, world: World, function: Function, authorization_header: str
) -> None:
    """Every function, before it looks at anything else."""
    headers = {"authorization": authorization_header} if authorization_header else {}
    response = await call(anyone, function, headers=headers)
    check(response, 401, "unauthenticated")
    assert response.headers["www-authenticate"] == "Bearer"
    assert world.events == []


async def test_a_second_token_is_not_chosen_from(anyone: httpx.AsyncClient) -> None:
    """Two headers might be read differently by a proxy and by us."""
    good = authorization()["authorization"]
    response = await anyone.get(
        "/terminal-list-sessions", headers=[("authorization", good), ("authorization", "Bearer x")]
    )
    check(response, 401, "unauthenticated")


async def test_an_expired_token_is_refused(anyone: httpx.AsyncClient) -> None:
    """The page fetches a new one at 401."""
    token = sign_local_token(SECRET, "alice", timedelta(minutes=-5))
    response = await anyone.get("/terminal-list-sessions", headers={"authorization": f"Bearer {token}"})
    assert "expired" in check(response, 401, "unauthenticated").detail


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])
async def test_a_wrong_method_is_named(alice: httpx.AsyncClient, world: World, function: Function, method: str) -> None:
    """And the right one with it."""
    if method == function.method:
        return
    response = await call(alice, function, method=method)
    assert (response.status_code, response.headers["allow"]) == (405, f"{function.method}, OPTIONS")
    assert world.events == []


@pytest.mark.parametrize("function", OF_A_SESSION)
@pytest.mark.parametrize("whose", ["nobody's", "somebody else's", "malformed", "no text"])
async def test_somebody_elses_session_looks_like_none(
    alice: httpx.AsyncClient, world: World, function: Function, whose: str
) -> None:
    """404 in every case: an id that exists must not be told from one that does not."""
    other = await world.session(user="bob")
    names = {"nobody's": "s" + "b" * 25, "somebody else's": str(other), "malformed": "x", "no text": "%00%ff"}
    name = names[whose]
    response = await call(alice, function, name)
    missing = await call(alice, function, "s" + "c" * 25)
    check(response, 404, "unknown_session")
    assert response.content == missing.content
    assert world.events == []


@pytest.mark.parametrize("function", ACTING)
@pytest.mark.parametrize("state", sorted(ENDED | {SessionState.CLOSING}))
async def test_an_ended_session_takes_nothing_more(
    alice: httpx.AsyncClient, world: World, function: Function, state: SessionState
) -> None:
    """409, also while it is closing."""
    name = await world.session(state)
    check(await call(alice, function, name), 409, "session_ended")
    assert world.events == []


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


@pytest.mark.parametrize("function", ALL)
async def test_a_preflight_allows_the_pages_on_the_list_and_no_others(
    anyone: httpx.AsyncClient, function: Function
) -> None:
    """A browser asks without a token; never a wildcard, never credentials."""
    headers = {"origin": ORIGIN, "access-control-request-method": function.method}
    response = await call(anyone, function, method="OPTIONS", headers=headers)
    assert response.status_code == 204
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert response.headers["access-control-allow-methods"] == function.method
    assert "Authorization" in response.headers["access-control-allow-headers"]
    assert int(response.headers["access-control-max-age"]) > 0
    assert response.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in response.headers
    for stranger in ("https://evil.example", "null", ORIGIN + ".evil.example", ORIGIN.upper(), ""):
        response = await call(anyone, function, method="OPTIONS", headers={"origin": stranger})
        check(response, 403, "forbidden")
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("function", ALL)
async def test_a_page_of_another_origin_is_refused_even_with_a_token(
    alice: httpx.AsyncClient, world: World, function: Function
) -> None:
    """Not only unreadable for it, but not done."""
    name = await world.session()
    check(await call(alice, function, name, headers={"origin": "https://evil.example"}), 403, "forbidden")
    assert world.events == []


async def test_a_page_on_the_list_may_read_answers_and_refusals(alice: httpx.AsyncClient) -> None:
    """Retry-After is of no use to a page that cannot see it; caches keep origins apart, also without one."""
    for status, path in ((200, "/terminal-list-sessions"), (404, "/terminal-get-status/x")):
        response = await alice.get(path, headers={"origin": ORIGIN})
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert "Retry-After" in response.headers["access-control-expose-headers"]
    response = await alice.get("/terminal-list-sessions")
    assert response.headers["vary"] == "Origin"
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("rollout", [Rollout(enabled=False), Rollout(users=("bob",))], ids=["off", "others only"])
async def test_the_rollout_keeps_out_whom_it_should(
    alice: httpx.AsyncClient, world: World, function: Function, rollout: Rollout
) -> None:
    """Switched off, or not open to this user yet."""
    await world.put(ROLLOUT_PATH, rollout)
    check(await call(alice, function), 403, "forbidden")
    assert world.events == []


async def test_a_changed_rollout_is_seen_within_half_a_minute(
    alice: httpx.AsyncClient, bob: httpx.AsyncClient, world: World
) -> None:
    """It is not read for each request, and needs no restart."""
    assert (await alice.get("/terminal-list-sessions")).status_code == 200
    await world.put(ROLLOUT_PATH, Rollout(users=("bob",)))
    assert (await alice.get("/terminal-list-sessions")).status_code == 200
    world.clock.advance(30)
    assert (await alice.get("/terminal-list-sessions")).status_code == 403
    assert (await bob.get("/terminal-list-sessions")).status_code == 200


@pytest.mark.parametrize("function", ALL)
async def test_a_store_that_is_away_is_no_ones_fault(
    alice: httpx.AsyncClient, world: World, function: Function
) -> None:
    """503 with Retry-After and without the path of the disk that failed."""
    if function.name == "terminal-firestore-token":
        return
    name = await world.session()
    assert (await alice.get("/terminal-list-sessions")).status_code == 200
    world.store.down = True
    response = await call(alice, function, name)
    problem = check(response, 503, "store_unavailable")
    assert "disk" not in problem.detail
    assert response.headers["retry-after"] == str(problem.retry_after)
    assert world.events == []


@pytest.mark.parametrize("function", [FUNCTIONS[name] for name in BODIES if name != "terminal-get-output"])
async def test_a_bus_that_is_away_leaves_nothing_half_done(
    alice: httpx.AsyncClient, world: World, function: Function
) -> None:
    """503 with Retry-After; asking again is the same event."""
    name = await world.session()
    world.bus.down = True
    response = await call(alice, function, name, headers={"idempotency-key": "again"})
    assert "10.0.0.7" not in check(response, 503, "bus_unavailable").detail
    assert response.headers["retry-after"]
    assert world.events == []


async def test_a_defect_is_told_without_details(
    alice: httpx.AsyncClient, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A document that this version cannot read is logged with its traceback and answered with 500."""
    name = await world.session()
    await world.change(name, rows="secret")
    problem = check(await alice.get(f"/terminal-get-status/{name}"), 500, "internal")
    assert "secret" not in problem.model_dump_json()
    assert "ValidationError" in caplog.text


async def test_what_a_client_says_about_itself_is_not_believed(alice: httpx.AsyncClient, world: World) -> None:
    """`userId` and `podName` come from old clients; the token says who calls."""
    name = await world.session(user="bob")
    body = {"sessionId": name, "command": "ls", "userId": "bob", "podName": f"session-{name}"}
    check(await alice.post("/terminal-execute-command", json=body), 404, "unknown_session")


async def test_a_trace_context_rides_along_if_it_is_one(alice: httpx.AsyncClient, world: World) -> None:
    """What is no W3C trace context does not get onto a topic."""
    name = await world.session()
    good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    for sent, passed in ((good, good), ("x", ""), (good + "\u00e9", "")):
        body = {"sessionId": name, "text": "x"}
        await alice.post("/terminal-send-input", json=body, headers={b"traceparent": sent.encode()})
        assert world.bus.published[-1].traceparent == passed


async def test_the_session_id_is_the_paths_last_segment_wherever_the_function_lives(
    alice: httpx.AsyncClient, world: World
) -> None:
    """Behind the gateway it is /terminal-get-status/ID, alone it is /ID."""
    name: SessionId = await world.session()
    handler = routes(world.services)["terminal-get-status"]

    async def alone(scope: Any, receive: Any, send: Any) -> None:
        await (await handler(Request(scope, receive)))(scope, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(alone), base_url="http://f") as client:
        for path in (f"/{name}", f"/{name}/", f"/a/b/{name}"):
            response = await client.get(path, headers=authorization())
            assert json.loads(response.content)["sessionId"] == name
        check(await client.get("/", headers=authorization()), 404, "unknown_session")
