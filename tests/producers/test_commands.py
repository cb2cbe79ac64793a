"""Submitting and listing commands, keystrokes, sizes and signals."""

from __future__ import annotations

import base64
from datetime import timedelta
from typing import Any

import httpx
import pytest

from schemas.documents import ChangedFile, Command, command_path
from schemas.events import CommandSubmitted, InputSent, Signal, SignalSent, TerminalResized
from schemas.ids import SessionId
from schemas.lifecycle import CommandState, SessionState
from schemas.limits import MAX_COMMAND_BYTES, MAX_INPUT_BYTES
from tests.producers.world import World


@pytest.fixture
async def session(world: World) -> SessionId:
    """A session that is ready."""
    return await world.session()


async def post(client: httpx.AsyncClient, function: str, session: str, **body: Any) -> httpx.Response:
    return await client.post(f"/terminal-{function}", json={"sessionId": session, **body})


async def test_a_command_is_on_its_way(alice: httpx.AsyncClient, world: World, session: SessionId) -> None:
    """The answer has the shape that the existing frontend reads; events are ordered by session."""
    response = await post(alice, "execute-command", session, command="ls\necho 1", commandId="c1", timeoutSeconds=5)
    assert response.status_code == 202
    assert response.json() == {"success": True, "commandId": "c1", "command": "ls\necho 1", "output": ""}
    assert world.events == [CommandSubmitted(command_id="c1", text="ls\necho 1", timeout_seconds=5)]
    assert world.bus.messages[0].ordering_key == session
    assert world.bus.published[0].subject == session


async def test_a_repeated_command_is_the_same_event(alice: httpx.AsyncClient, world: World, session: SessionId) -> None:
    """The consumer takes it once; without an id each submission is a command of its own."""
    answers = [await post(alice, "execute-command", session, command="ls", commandId="c1") for _ in range(2)]
    assert answers[0].json() == answers[1].json()
    assert len({cloud_event.id for cloud_event in world.bus.published}) == 1
    answers = [await post(alice, "execute-command", session, command="ls") for _ in range(2)]
    assert len({answer.json()["commandId"] for answer in answers}) == 2


@pytest.mark.parametrize("state", [SessionState.REQUESTED, SessionState.QUEUED, SessionState.STARTING])
async def test_a_command_may_be_submitted_before_the_sandbox_is_there(
    alice: httpx.AsyncClient, world: World, state: SessionState
) -> None:
    """It runs when the session is ready."""
    assert (await post(alice, "execute-command", await world.session(state), command="ls")).status_code == 202


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        pytest.param({"command": "x" * (MAX_COMMAND_BYTES + 1)}, 413, "too_large", id="one byte too long"),
        pytest.param({"command": "€" * (MAX_COMMAND_BYTES // 3 + 1)}, 413, "too_large", id="too long in UTF-8"),
        pytest.param({"command": "echo \0"}, 400, "malformed", id="NUL"),
        pytest.param({"command": None}, 400, "malformed", id="null"),
        pytest.param({}, 400, "malformed", id="missing"),
        pytest.param({"command": "ls", "commandId": ""}, 400, "malformed", id="empty id"),
        pytest.param({"command": "ls", "commandId": "a/b"}, 400, "malformed", id="id with a slash"),
        pytest.param({"command": "ls", "commandId": "c1\n"}, 400, "malformed", id="id with a newline"),
        pytest.param(
            {"command": "ls", "commandId": "__x__"}, 400, "malformed", id="id that the store keeps for itself"
        ),
        pytest.param({"command": "ls", "commandId": "x" * 65}, 400, "malformed", id="long id"),
        pytest.param({"command": "ls", "timeoutSeconds": 0}, 400, "malformed", id="no time"),
        pytest.param({"command": "ls", "timeoutSeconds": 10**9}, 400, "malformed", id="too much time"),
        pytest.param({"command": "ls", "timeoutSeconds": True}, 400, "malformed", id="time is a flag"),
    ],
)
async def test_a_command_that_cannot_run_is_refused_at_the_door(
    alice: httpx.AsyncClient, world: World, session: SessionId, body: dict[str, Any], status: int, code: str
) -> None:
    """It never becomes an event."""
    response = await post(alice, "execute-command", session, **body)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert world.events == []


async def test_the_longest_command_is_taken(alice: httpx.AsyncClient, world: World, session: SessionId) -> None:
    """64 KiB to the byte."""
    response = await post(alice, "execute-command", session, command="x" * MAX_COMMAND_BYTES)
    assert response.status_code == 202
    assert len(world.events) == 1


async def test_commands_are_listed_with_how_they_ended(
    alice: httpx.AsyncClient, world: World, session: SessionId
) -> None:
    """By number, in pages; changed files and exit code included."""
    now = world.clock.now()
    for number in range(1, 6):
        command = Command(
            number=number,
            text=f"echo {number}",
            state=CommandState.EXITED if number < 5 else CommandState.WAITING,
            exit_code=number if number < 5 else None,
            changed_files=(ChangedFile(path="a.py", change="created"),) if number == 1 else (),
            submitted_at=now,
            ended_at=now + timedelta(seconds=1) if number < 5 else None,
            expire_at=world.later,
        )
        await world.put(command_path(session, f"c{number}"), command)
    listed = (await alice.get(f"/terminal-list-commands/{session}")).json()["commands"]
    assert [(c["commandId"], c["number"], c["command"], c["exitCode"]) for c in listed] == [
        ("c1", 1, "echo 1", 1),
        ("c2", 2, "echo 2", 2),
        ("c3", 3, "echo 3", 3),
        ("c4", 4, "echo 4", 4),
        ("c5", 5, "echo 5", None),
    ]
    assert (listed[0]["state"], listed[4]["state"]) == ("exited", "waiting")
    assert listed[0]["changedFiles"] == [{"path": "a.py", "change": "created"}]
    page = await alice.get(f"/terminal-list-commands/{session}", params={"after": 2, "limit": 2})
    assert [command["number"] for command in page.json()["commands"]] == [3, 4]
    for wrong in ({"after": -1}, {"after": "x"}, {"after": 2**63 - 1}, {"after": 10**30}, {"limit": 0}):
        assert (await alice.get(f"/terminal-list-commands/{session}", params=wrong)).status_code == 400


@pytest.mark.parametrize(
    ("body", "data"),
    [
        ({"text": "ü\x03"}, "ü\x03".encode()),
        ({"data": base64.b64encode(b"\xff\x00\x1b[A").decode()}, b"\xff\x00\x1b[A"),
        ({"text": ""}, b""),
    ],
)
async def test_keystrokes_arrive_as_they_were_typed(
    alice: httpx.AsyncClient, world: World, session: SessionId, body: dict[str, Any], data: bytes
) -> None:
    """As text, or as any bytes."""
    assert (await post(alice, "send-input", session, **body)).status_code == 202
    assert world.events == [InputSent(data=data)]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param({}, 400, id="nothing"),
        pytest.param({"text": "x", "data": "eA=="}, 400, id="both"),
        pytest.param({"data": "eA"}, 400, id="no padding"),
        pytest.param({"data": "e A=="}, 400, id="a space"),
        pytest.param({"data": "_-=="}, 400, id="other alphabet"),
        pytest.param({"text": "x" * (MAX_INPUT_BYTES + 1)}, 413, id="too long"),
        pytest.param({"data": base64.b64encode(bytes(MAX_INPUT_BYTES + 1)).decode()}, 413, id="too many bytes"),
    ],
)
async def test_input_that_is_none_is_refused(
    alice: httpx.AsyncClient, world: World, session: SessionId, body: dict[str, Any], status: int
) -> None:
    """Guessing what was meant would type the wrong thing."""
    assert (await post(alice, "send-input", session, **body)).status_code == status
    assert world.events == []


async def test_a_repeated_keystroke_counts_once_if_it_has_an_id(
    alice: httpx.AsyncClient, world: World, session: SessionId
) -> None:
    """A client that retries gives one; the same key pressed twice is two events."""
    for _ in range(2):
        await post(alice, "send-input", session, text="x", requestId="r1")
        await post(alice, "resize", session, rows=1, cols=1, requestId="r1")
        await post(alice, "signal", session, requestId="r1")
        await post(alice, "send-input", session, text="x")
    assert len(world.events) == 8
    assert len({cloud_event.id for cloud_event in world.bus.published}) == 5


async def test_the_terminal_can_be_resized_and_signalled(
    alice: httpx.AsyncClient, world: World, session: SessionId
) -> None:
    """With a commandId a signal cancels that command."""
    await post(alice, "resize", session, rows=50, cols=132)
    await post(alice, "signal", session, signal="QUIT")
    await post(alice, "signal", session, signal="INT", commandId="c1")
    assert world.events == [
        TerminalResized(rows=50, cols=132),
        SignalSent(signal=Signal.QUIT),
        SignalSent(signal=Signal.INT, command_id="c1"),
    ]


@pytest.mark.parametrize(("rows", "cols"), [(0, 80), (24, 0), (501, 80), (24, 1001), (-1, 80), (24.5, 80), ("24", 80)])
async def test_a_size_that_no_terminal_has_is_refused(
    alice: httpx.AsyncClient, world: World, session: SessionId, rows: Any, cols: Any
) -> None:
    """Some programs allocate what they are told."""
    assert (await post(alice, "resize", session, rows=rows, cols=cols)).status_code == 400
    assert world.events == []


class StaticMinter:
    """Implements schemas.ports.Minter without a key."""

    async def mint(self, principal: Any) -> str:
        """A token that names its user."""
        return f"token of {principal.user}"


async def test_a_browser_gets_its_own_firestore_token(alice: httpx.AsyncClient, world: World) -> None:
    """For the user of the access token; where there is no Firestore the answer says so with a code of its own."""
    response = await alice.post("/terminal-firestore-token")
    assert (response.status_code, response.json()["code"]) == (501, "not_offered")
    object.__setattr__(world.services, "minter", StaticMinter())
    response = await alice.post("/terminal-firestore-token", json={"userId": "bob"})
    assert response.json() == {"token": "token of alice"}
