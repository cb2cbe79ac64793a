"""Writing, listing and reading files of the workspace."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from schemas.documents import Transfer, TransferState, transfer_path
from schemas.events import FileItem, FileRequested, FilesPushed
from schemas.ids import SessionId
from schemas.lifecycle import SessionState
from schemas.limits import MAX_CHUNK_BYTES, MAX_FILE_BYTES, MAX_FILES, MAX_PUSH_BYTES
from tests.producers.world import World
from tests.waiting import until


@pytest.fixture
async def session(world: World) -> SessionId:
    """A session that is ready."""
    return await world.session()


async def settle(world: World, session: str, *, content: bytes = b"", **fields: Any) -> FileRequested | FilesPushed:
    """Do what the worker does with the next event: write the content, then say that it is done, or failed."""

    async def asked() -> bool:
        return bool(world.events)

    await until(asked, "an event is published")
    event = world.events[-1]
    assert isinstance(event, FileRequested | FilesPushed)
    assert event.transfer_id is not None
    path = transfer_path(session, event.transfer_id)
    for offset in range(0, len(content), MAX_CHUNK_BYTES):
        await world.print(path, offset, content[offset : offset + MAX_CHUNK_BYTES])
    what = event.what if isinstance(event, FileRequested) else "push"
    settled = {"state": TransferState.DONE, "what": what, "size": len(content), **fields}
    await world.put(path, Transfer(created_at=world.clock.now(), expire_at=world.later, **settled))
    return event


@asynccontextmanager
async def worker(world: World, session: str, **fields: Any) -> AsyncIterator[None]:
    """A worker that settles one transfer meanwhile."""
    working = asyncio.create_task(settle(world, session, **fields))
    yield
    await working


async def push(client: httpx.AsyncClient, session: str, *files: dict[str, Any], **body: Any) -> httpx.Response:
    return await client.post("/terminal-sync-files", json={"sessionId": session, "fileStructure": list(files), **body})


async def test_files_are_written_in_order_before_the_answer(
    alice: httpx.AsyncClient, world: World, session: SessionId
) -> None:
    """200 means written: the next command sees them."""
    async with worker(world, session):
        response = await push(
            alice,
            session,
            {"path": "src", "type": "directory"},
            {"path": "src/a.py", "type": "file", "content": "print('ü')\n"},
            {"path": "b.bin", "type": "file", "content": base64.b64encode(b"\xff\0").decode(), "encoding": "base64"},
            {"path": "run", "content": "", "mode": 0o755},
            {"path": "old.py", "type": "delete"},
            requestId="r1",
        )
    assert response.status_code == 200
    assert response.json() == {"success": True, "transferId": "r1", "files": 5, "pending": False}
    items = (
        FileItem(path="src", type="directory"),
        FileItem(path="src/a.py", data="print('ü')\n".encode()),
        FileItem(path="b.bin", data=b"\xff\0"),
        FileItem(path="run", mode=0o755),
        FileItem(path="old.py", type="delete"),
    )
    assert world.events == [FilesPushed(items=items, transfer_id="r1")]


async def test_no_files_are_no_event(alice: httpx.AsyncClient, world: World, session: SessionId) -> None:
    """An empty project is fine."""
    response = await push(alice, session)
    assert (response.status_code, response.json()["pending"]) == (200, False)
    assert world.events == []


async def test_files_for_a_session_that_waits_are_accepted(alice: httpx.AsyncClient, world: World) -> None:
    """They are written once it is ready; nobody can wait for that."""
    name = await world.session(SessionState.QUEUED)
    response = await push(alice, name, {"path": "a.py", "content": "1"})
    assert (response.status_code, response.json()["pending"]) == (202, True)
    assert len(world.events) == 1


async def test_a_slow_write_is_accepted(alice: httpx.AsyncClient, world: World, session: SessionId) -> None:
    """The caller is not kept waiting for ever, and is told that it is not done yet."""
    pushing = asyncio.create_task(push(alice, session, {"path": "a.py", "content": "1"}))
    await world.clock.slept_on()
    world.clock.advance(20)
    response = await pushing
    assert (response.status_code, response.json()["pending"]) == (202, True)
    assert (world.store.listeners, world.clock.sleepers) == (0, 0)


MANY = [{"path": f"f{number}", "content": ""} for number in range(10_000)]
BIG = "x" * MAX_FILE_BYTES
HALF = "x" * (MAX_PUSH_BYTES // 2 + 1)


@pytest.mark.parametrize(
    ("files", "status", "code"),
    [
        pytest.param(MANY, 413, "too_large", id="10,000 files"),
        pytest.param(MANY[: MAX_FILES + 1], 413, "too_large", id="one file too many"),
        pytest.param([{"path": "a", "content": BIG + "x"}], 413, "too_large", id="a file too large"),
        pytest.param([{"path": "a", "content": HALF}, {"path": "b", "content": HALF}], 413, "too_large", id="too much"),
        pytest.param([{"path": "../x", "content": ""}], 400, "malformed", id="traversal"),
        pytest.param([{"path": "a/../../x", "content": ""}], 400, "malformed", id="traversal inside"),
        pytest.param([{"path": "/etc/passwd", "content": ""}], 400, "malformed", id="absolute"),
        pytest.param([{"path": "", "content": ""}], 400, "malformed", id="no path"),
        pytest.param([{"path": "a//b", "content": ""}], 400, "malformed", id="empty part"),
        pytest.param([{"path": "a\0b", "content": ""}], 400, "malformed", id="NUL"),
        pytest.param([{"path": "x" * 1025, "content": ""}], 400, "malformed", id="long path"),
        pytest.param([{"path": "a", "content": "é", "encoding": "base64"}], 400, "malformed", id="no base64"),
        pytest.param([{"path": "a", "content": "eA", "encoding": "base64"}], 400, "malformed", id="no padding"),
        pytest.param([{"path": "a", "content": "x", "encoding": "utf-16"}], 400, "malformed", id="other encoding"),
        pytest.param([{"path": "a", "type": "symlink"}], 400, "malformed", id="other type"),
        pytest.param([{"path": "a", "type": "directory", "content": "x"}], 400, "malformed", id="directory content"),
        pytest.param([{"path": "a", "mode": 0o4755}], 400, "malformed", id="set-uid"),
        pytest.param(["a"], 400, "malformed", id="a string"),
    ],
)
async def test_files_that_cannot_be_written_are_refused_at_the_door(
    alice: httpx.AsyncClient, world: World, session: SessionId, files: list[Any], status: int, code: str
) -> None:
    """All of them: a push is not half done."""
    response = await push(alice, session, *files)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert world.events == []


@pytest.mark.parametrize("name", ["a.py", "src/ü €.txt"])
@pytest.mark.parametrize("content", [b"", b"print(1)\n", "ü€".encode(), b"\xff\xfe\0", b"x" * (MAX_CHUNK_BYTES + 1)])
async def test_a_file_is_read_as_it_is(
    alice: httpx.AsyncClient, world: World, session: SessionId, content: bytes, name: str
) -> None:
    """As JSON, with text as text and anything else as base64, or as its very bytes, which no browser runs."""
    async with worker(world, session, content=content, mode=0o755):
        response = await alice.get(f"/terminal-read-file/{session}", params={"path": name})
    assert response.status_code == 200
    answer = response.json()
    assert (answer["path"], answer["size"], answer["mode"]) == (name, len(content), 0o755)
    text = answer["content"]
    assert (text.encode() if answer["encoding"] == "utf-8" else base64.b64decode(text)) == content
    assert answer["encoding"] == ("base64" if b"\xff" in content else "utf-8")
    world.bus.published.clear()
    async with worker(world, session, content=content):
        headers = {"accept": "application/octet-stream, */*;q=0.1"}
        response = await alice.get(f"/terminal-read-file/{session}", params={"path": name}, headers=headers)
    assert response.content == content
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-disposition"].startswith("attachment; filename*=UTF-8''")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("not_found", 404),
        ("not_a_file", 409),
        ("too_large", 413),
        ("bad_path", 400),
        ("no_space", 409),
        ("session_ended", 409),
        ("denied", 409),
        ("something_new", 409),
    ],
)
async def test_a_refusal_of_the_sandbox_is_the_callers(
    alice: httpx.AsyncClient, world: World, session: SessionId, code: str, status: int
) -> None:
    """With the sandbox's own code and words."""
    failed = {"state": TransferState.FAILED, "code": code, "message": "a.py: no"}
    async with worker(world, session, **failed):
        response = await alice.get(f"/terminal-read-file/{session}", params={"path": "a.py"})
    assert (response.status_code, response.json()["code"], response.json()["detail"]) == (status, code, "a.py: no")
    world.bus.published.clear()
    async with worker(world, session, **failed):
        response = await push(alice, session, {"path": "a.py", "content": ""})
    assert (response.status_code, response.json()["code"]) == (status, code)


async def test_a_sandbox_that_does_not_answer_is_asked_again_later(
    alice: httpx.AsyncClient, world: World, session: SessionId
) -> None:
    """503 with Retry-After, and nothing is left listening."""
    reading = asyncio.create_task(alice.get(f"/terminal-read-file/{session}", params={"path": "a.py"}))
    await world.clock.slept_on()
    world.clock.advance(20)
    response = await reading
    assert (response.status_code, response.json()["code"]) == (503, "transfer_pending")
    assert response.headers["retry-after"]
    assert (world.store.listeners, world.clock.sleepers) == (0, 0)


@pytest.mark.parametrize("state", [SessionState.REQUESTED, SessionState.QUEUED, SessionState.STARTING])
@pytest.mark.parametrize("function", ["read", "list"])
async def test_a_session_without_a_sandbox_has_no_files_yet(
    alice: httpx.AsyncClient, world: World, state: SessionState, function: str
) -> None:
    """Said at once rather than after a time-out."""
    name = await world.session(state)
    path = f"/terminal-{function}-file{'s' if function == 'list' else ''}/{name}"
    response = await alice.get(path, params={"path": "a"})
    assert (response.status_code, response.json()["code"]) == (503, "not_ready")
    assert response.headers["retry-after"]
    assert world.events == []


async def test_a_file_of_which_bytes_are_missing_is_not_passed_off_as_whole(
    alice: httpx.AsyncClient, world: World, session: SessionId
) -> None:
    """Truncated content is worse than none."""
    async with worker(world, session, content=b"half", size=8):
        response = await alice.get(f"/terminal-read-file/{session}", params={"path": "a.py"})
    assert (response.status_code, response.json()["code"]) == (503, "unavailable")


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/./b", "a/"])
async def test_a_path_out_of_the_workspace_is_refused(
    alice: httpx.AsyncClient, world: World, session: SessionId, path: str
) -> None:
    """Also for reading, and for listing but for the workspace itself."""
    response = await alice.get(f"/terminal-read-file/{session}", params={"path": path})
    assert (response.status_code, response.json()["code"]) == (400, "malformed")
    if path:
        response = await alice.get(f"/terminal-list-files/{session}", params={"path": path})
        assert (response.status_code, response.json()["code"]) == (400, "malformed")
    assert world.events == []


async def test_a_directory_is_listed(alice: httpx.AsyncClient, world: World, session: SessionId) -> None:
    """What the sandbox found, and whether there is more."""
    entry = {"path": "src/a.py", "type": "file", "size": 3, "mode": 0o644, "modified": 1.5}
    listing = json.dumps({"files": [entry], "truncated": True}).encode()
    async with worker(world, session, content=listing):
        response = await alice.get(f"/terminal-list-files/{session}", params={"path": "src"})
    assert response.json() == {"files": [entry], "truncated": True}
    requested = world.events[-1]
    assert isinstance(requested, FileRequested)
    assert (requested.path, requested.what) == ("src", "listing")
