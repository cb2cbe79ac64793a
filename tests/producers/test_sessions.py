"""Creating, finding, listing and ending sessions."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import httpx
import pytest

from producers.services import Services
from schemas.documents import Session, User, session_path, user_path
from schemas.events import CloseReason, SessionClosed, SessionRequested
from schemas.ids import is_session_id
from schemas.lifecycle import SessionState
from tests.producers.world import World


async def test_a_new_session_is_recorded_counted_and_asked_for(alice: httpx.AsyncClient, world: World) -> None:
    """Status, reconnect and rules work at once, since everything about a session is stored before its event."""
    body = {"userId": "mallory", "podName": "mine", "reconnect": False, "rows": 30, "cols": 100}
    response = await alice.post("/terminal-create-session", json=body)
    assert response.status_code == 202
    name = response.json()["sessionId"]
    assert is_session_id(name)
    assert response.json() == {"sessionId": name, "podName": f"session-{name}", "status": "requested"}
    assert world.events == [SessionRequested(user_id="alice", rows=30, cols=100)]
    session = await world.stored(Session, session_path(name))
    now, limits = world.clock.now(), world.services.limits
    assert (session.user_id, session.state, session.live) == ("alice", SessionState.REQUESTED, True)
    assert session.deadline == now + limits.request_timeout
    assert session.expires_at == now + limits.session_lifetime
    assert session.expire_at == session.expires_at + limits.retention
    assert (await world.stored(User, user_path("alice"))).live_sessions == 1


@pytest.mark.parametrize("where", ["body", "header"])
async def test_a_repeated_request_finds_the_same_session(alice: httpx.AsyncClient, world: World, where: str) -> None:
    """A client that did not get the answer asks again; that must neither cost a sandbox nor count twice."""
    body = {"requestId": "abc"} if where == "body" else {}
    headers = {"idempotency-key": "abc"} if where == "header" else {}
    answers = [await alice.post("/terminal-create-session", json=body, headers=headers) for _ in range(2)]
    assert answers[0].json() == answers[1].json()
    assert (await world.stored(User, user_path("alice"))).live_sessions == 1
    assert len({cloud_event.id for cloud_event in world.bus.published}) == 1


async def test_many_repeated_requests_at_once_make_one_session(alice: httpx.AsyncClient, world: World) -> None:
    """A double click is not two sessions."""
    body = {"requestId": "abc"}
    answers = await asyncio.gather(*(alice.post("/terminal-create-session", json=body) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["sessionId"] for answer in answers}) == 1
    assert (await world.stored(User, user_path("alice"))).live_sessions == 1


async def test_the_same_request_id_of_another_user_is_another_session(
    alice: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    """Request ids are made by clients; nobody reaches into somebody else's session with one."""
    answers = [await client.post("/terminal-create-session", json={"requestId": "abc"}) for client in (alice, bob)]
    assert answers[0].json()["sessionId"] != answers[1].json()["sessionId"]


async def test_more_sessions_than_allowed_are_refused(alice: httpx.AsyncClient, world: World) -> None:
    """429 says when to try again, and leaves no trace."""
    for _ in range(3):
        assert (await alice.post("/terminal-create-session", json={})).status_code == 202
    response = await alice.post("/terminal-create-session", json={})
    assert (response.status_code, response.json()["code"]) == (429, "limit_reached")
    assert response.headers["retry-after"] == str(response.json()["retryAfter"])
    assert (await world.stored(User, user_path("alice"))).live_sessions == 3
    assert len(world.events) == 3


async def test_sessions_created_at_once_cannot_pass_the_limit(alice: httpx.AsyncClient, world: World) -> None:
    """Counting and creating are one transaction."""
    answers = await asyncio.gather(*(alice.post("/terminal-create-session", json={}) for _ in range(10)))
    assert sorted(answer.status_code for answer in answers) == [202] * 3 + [429] * 7
    assert (await world.stored(User, user_path("alice"))).live_sessions == 3


async def test_a_users_own_limit_wins(alice: httpx.AsyncClient, world: World) -> None:
    """Somebody may be given more, or nothing at all."""
    await world.put(user_path("alice"), User(live_sessions=0, max_sessions=0))
    assert (await alice.post("/terminal-create-session", json={})).status_code == 429


async def test_a_recorded_session_is_accepted_even_if_the_bus_is_away(alice: httpx.AsyncClient, world: World) -> None:
    """The sweep asks for it again; a 503 would make the client create another one."""
    world.bus.down = True
    response = await alice.post("/terminal-create-session", json={})
    assert response.status_code == 202
    session = await world.stored(Session, session_path(response.json()["sessionId"]))
    assert session.state is SessionState.REQUESTED
    assert session.deadline is not None


async def test_nothing_is_said_about_a_session_that_could_not_be_recorded(
    alice: httpx.AsyncClient, world: World
) -> None:
    """The store is asked first: an event without its document would be a session nobody can see."""
    world.store.down = True
    response = await alice.post("/terminal-create-session", json={})
    assert (response.status_code, response.json()["code"]) == (503, "store_unavailable")
    assert world.events == []


async def test_an_image_that_is_not_on_the_list_is_refused(alice: httpx.AsyncClient, world: World) -> None:
    """Who may name any image runs anything."""
    response = await alice.post("/terminal-create-session", json={"image": "evil.example/miner"})
    assert (response.status_code, response.json()["code"]) == (400, "malformed")
    assert world.events == []


async def test_reconnect_finds_the_newest_session_that_takes_input(alice: httpx.AsyncClient, world: World) -> None:
    """A reloaded page goes on where it was, not in a session that is being closed, nor in somebody else's."""
    await world.session(SessionState.READY)
    wanted = await world.session(SessionState.QUEUED)
    await world.session(SessionState.CLOSING)
    await world.session(SessionState.CLOSED)
    await world.session(SessionState.READY, user="bob")
    response = await alice.post("/terminal-create-session", json={"reconnect": True})
    assert response.status_code == 202
    assert (response.json()["sessionId"], response.json()["status"]) == (wanted, "queued")
    assert world.events == []


async def test_reconnect_without_a_live_session_makes_one(alice: httpx.AsyncClient, world: World) -> None:
    """The page need not ask first."""
    await world.session(SessionState.CLOSED)
    response = await alice.post("/terminal-create-session", json={"reconnect": True})
    assert (response.status_code, response.json()["status"]) == (202, "requested")
    assert len(world.events) == 1


async def test_status_shows_what_a_person_wants_to_know(alice: httpx.AsyncClient, world: World) -> None:
    """Why it waits, where in the queue, when it will be closed; nothing of how it is tended."""
    name = await world.session(SessionState.QUEUED, position=4, queued_at=world.clock.now())
    status = (await alice.get(f"/terminal-get-status/{name}")).json()
    assert (status["status"], status["state"], status["position"]) == ("queued", "queued", 4)
    assert "Position 4" in status["reason"]
    assert not {"epoch", "tender", "tendedAt", "podUid", "agentBootId", "userId"} & status.keys()
    closing = world.clock.now() + timedelta(minutes=2)
    await world.change(name, state="ready", position=None, warning=closing, podName="pool-7")
    status = (await alice.get(f"/terminal-get-status/{name}")).json()
    assert (status["podName"], status["warning"]) == ("pool-7", "2026-11-02T12:02:00Z")


@pytest.mark.parametrize(
    ("reason", "words"), [("idle", "Nothing happened"), ("the node was drained", "the node was drained")]
)
async def test_status_says_why_a_session_ended(alice: httpx.AsyncClient, world: World, reason: str, words: str) -> None:
    """Known reasons are put into words; others are words already."""
    name = await world.session(SessionState.LOST, reason=reason)
    assert words in (await alice.get(f"/terminal-get-status/{name}")).json()["reason"]


async def test_list_shows_the_callers_sessions_newest_first(alice: httpx.AsyncClient, world: World) -> None:
    """Ended ones too, nobody else's, and no more than asked for."""
    names = [await world.session(state) for state in (SessionState.CLOSED, SessionState.READY, SessionState.LOST)]
    await world.session(user="bob")
    listed = (await alice.get("/terminal-list-sessions")).json()["sessions"]
    assert [session["sessionId"] for session in listed] == names[::-1]
    listed = (await alice.get("/terminal-list-sessions", params={"limit": 1})).json()["sessions"]
    assert [session["sessionId"] for session in listed] == names[-1:]


async def test_a_live_session_is_found_behind_any_number_of_ended_ones(alice: httpx.AsyncClient, world: World) -> None:
    """Whoever runs a hundred scripts does not lose sight of the session that was there before them."""
    old = await world.session(SessionState.READY)
    newer = [await world.session(SessionState.CLOSED) for _ in range(5)]
    closing = await world.session(SessionState.CLOSING)
    await world.session(SessionState.READY, user="bob")
    listed = (await alice.get("/terminal-list-sessions", params={"live": "true", "limit": 3})).json()["sessions"]
    assert [session["sessionId"] for session in listed] == [closing, old]
    listed = (await alice.get("/terminal-list-sessions", params={"live": "false"})).json()["sessions"]
    assert [session["sessionId"] for session in listed] == [closing, *newer[::-1], old]


@pytest.mark.parametrize("live", [{}, {"live": "true"}])
async def test_the_list_goes_on_page_by_page(alice: httpx.AsyncClient, world: World, live: dict[str, str]) -> None:
    """The last one's time of creation is where the next page begins: every session once."""
    names = [await world.session() for _ in range(5)]
    seen: list[str] = []
    before: dict[str, str] = {}
    while page := (await alice.get("/terminal-list-sessions", params={"limit": 2, **live, **before})).json()[
        "sessions"
    ]:
        seen += [session["sessionId"] for session in page]
        before = {"before": page[-1]["createdAt"]}
    assert seen == names[::-1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"live": "perhaps"},
        {"before": "yesterday"},
        {"before": "2026-01-01T00:00:00"},
        {"before": "0001-01-01T00:00:00Z"},
        {"before": "9999-12-31T23:59:59-14:00"},
        {"before": "1e300"},
    ],
)
async def test_a_list_of_an_unreasonable_time_is_refused(alice: httpx.AsyncClient, wrong: dict[str, str]) -> None:
    """A moment without a time zone is none, and one that no store can hold is no failure of ours."""
    response = await alice.get("/terminal-list-sessions", params=wrong)
    assert (response.status_code, response.json()["code"]) == (400, "malformed")


@pytest.mark.parametrize("limit", ["0", "101", "x", "", "1e1", "-1"])
async def test_a_list_of_unreasonable_length_is_refused(alice: httpx.AsyncClient, limit: str) -> None:
    """What a query string says is checked like a body."""
    response = await alice.get("/terminal-list-sessions", params={"limit": limit})
    assert (response.status_code, response.json()["code"]) == (400, "malformed")


async def test_cleanup_asks_for_the_end_as_often_as_one_likes(alice: httpx.AsyncClient, world: World) -> None:
    """Repeating it is the same event; a session that has ended already is no error."""
    name = await world.session()
    answers = [await alice.delete(f"/terminal-cleanup-session/{name}") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert set(world.events) == {SessionClosed(reason=CloseReason.USER)}
    assert len({cloud_event.id for cloud_event in world.bus.published}) == 1
    await world.end(name, 0)
    answer = await alice.delete(f"/terminal-cleanup-session/{name}")
    assert (answer.status_code, answer.json()["status"]) == (200, "closed")
    assert len(world.events) == 2


async def test_an_administrator_may_end_but_not_type(world: World) -> None:
    """Seeing and ending is what running a service takes; typing into a session is its owner's alone."""
    name = await world.session(user="bob")
    async with world.client("root", admin=True) as admin:
        assert (await admin.get(f"/terminal-get-status/{name}")).status_code == 200
        response = await admin.post("/terminal-send-input", json={"sessionId": name, "text": "x"})
        assert response.status_code == 404
        assert (await admin.delete(f"/terminal-cleanup-session/{name}")).status_code == 202
    assert world.events == [SessionClosed(reason=CloseReason.ADMIN)]


async def test_the_session_document_is_what_was_promised_even_under_other_limits(world: World) -> None:
    """Deadlines follow the deployment's limits."""
    shorter = world.services.limits.model_copy(update={"session_lifetime": timedelta(minutes=1)})
    world.services = Services(**{**vars(world.services), "limits": shorter})
    async with world.client() as client:
        name = (await client.post("/terminal-create-session", json={})).json()["sessionId"]
    assert (await world.stored(Session, session_path(name))).expires_at == world.clock.now() + timedelta(minutes=1)
