"""What every function refuses, and that a refusal says nothing on any topic."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from producers.identity import sign_local_token
from producers.routes import WORK, routes
from schemas.documents import ROLLOUT_PATH, Rollout
from schemas.functions import FUNCTIONS, Function
from schemas.ids import SessionId
from schemas.lifecycle import ENDED, SessionState
from schemas.limits import MAX_TOKEN_BYTES
from tests.producers.calls import ACTING, ALL, BODIES, OF_A_SESSION, call, check
from tests.producers.world import SECRET, World, authorization


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
