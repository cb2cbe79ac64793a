"""Whole stacks on a real cluster, and users who leave nothing behind."""

from __future__ import annotations

import base64
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.cluster.deployment import Deployment
from tests.journeys.stack import Stack, User
from tests.waiting import until

PATIENCE = 90.0  # seconds; a kubelet looks at its pods' disks every ten or so, and ends one when it has looked twice


@asynccontextmanager
async def whole_stack(deployment: Deployment, folder: Path) -> AsyncIterator[Stack]:
    """A stack to be started. It leaves no pod when it is stopped: fails where one is left."""
    state = folder / "state"
    state.mkdir(mode=0o700)
    python = sys.executable  # pods bring their own
    stack = Stack(state, {**deployment.environment, "PIGEON_PYTHON": python})
    try:
        yield stack
    finally:
        await stack.stop()
        left = deployment.leftovers()
    assert left == [], stack.log()


@asynccontextmanager
async def guest(stack: Stack, deployment: Deployment, name: str) -> AsyncIterator[User]:
    """A user whose sessions are closed at the end; fails where a pod of theirs is left."""
    async with stack.user(name) as user:
        yield user
        theirs = {session for session in deployment.sessions() if await _close(user, session)}

        async def none_left() -> bool:
            return theirs.isdisjoint(deployment.sessions())

        await until(none_left, f"the pods of {name} are gone", PATIENCE)


async def _close(user: User, session: str) -> bool:
    """Whether it is the user's; it may have ended already."""
    response = await user.http.delete(user.url(f"cleanup-session/{session}"))
    assert response.status_code in (202, 404, 409), response.text
    return response.status_code != 404


async def push(user: User, session: str, files: dict[str, bytes]) -> None:
    """Put files into the workspace, with the folders that they are in."""
    folders = {str(parent) for path in files for parent in Path(path).parents if parent != Path()}
    tree = [
        *({"path": folder, "type": "directory"} for folder in sorted(folders)),
        *(
            {"path": path, "type": "file", "content": base64.b64encode(content).decode(), "encoding": "base64"}
            for path, content in files.items()
        ),
    ]
    await user.call("POST", "sync-files", expect=200, json={"sessionId": session, "fileStructure": tree})


async def pull(user: User, session: str, path: str) -> bytes:
    """The content of a file of the workspace."""
    headers = {"accept": "application/octet-stream"}
    response = await user.http.get(user.url(f"read-file/{session}"), params={"path": path}, headers=headers)
    assert response.status_code == 200, response.text
    return response.content


async def do(user: User, session: str, text: str, patience: float = PATIENCE) -> tuple[int | None, bytes]:
    """The exit code and the output of a command that may take a while."""
    record = await user.ended(session, await user.execute(session, text), patience)
    return record["exitCode"], await user.read(session, record["startOffset"], record["endOffset"])
