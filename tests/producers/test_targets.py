"""Each function deployed alone, under Google's functions framework."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import httpx
import pytest

import producers.main
from infra.local.keys import token_secret
from producers.identity import sign_local_token
from schemas.functions import FUNCTIONS
from tests.waiting import until

SOURCE = Path(producers.main.__file__)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def deployed(target: str, state: Path) -> AsyncIterator[httpx.AsyncClient]:
    """One function in a process of its own, as a container of the cloud runs it, and a caller of it."""
    port = free_port()
    command = [sys.executable, "-m", "functions_framework", "--asgi", "--source", str(SOURCE), "--target", target]
    process = await asyncio.create_subprocess_exec(
        *command,
        *("--host", "127.0.0.1", "--port", str(port)),
        cwd=state,
        env={**os.environ, "PIGEON_STATE": str(state)},
    )
    token = sign_local_token(token_secret(state), "alice", timedelta(minutes=5))
    headers = {"authorization": f"Bearer {token}"}
    try:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False, timeout=30
        ) as client:

            async def serving() -> bool:
                assert process.returncode is None, f"{target} ended with {process.returncode}"
                try:
                    await client.get("/robots.txt")
                except httpx.TransportError:
                    return False
                return True

            await until(serving, f"{target} serves")
            yield client
    finally:
        process.terminate()
        await process.wait()


def test_every_function_is_a_target() -> None:
    """The framework finds a function by the name of a module's attribute."""
    for function in FUNCTIONS.values():
        assert asyncio.iscoroutinefunction(getattr(producers.main, function.target))


@pytest.mark.slow
async def test_functions_run_alone_and_share_what_is_stored(tmp_path: Path) -> None:
    """Three functions in three processes: what one records the others see, with the id as the whole path."""
    async with (
        deployed("terminal_create_session", tmp_path) as create,
        deployed("terminal_get_status", tmp_path) as status,
        deployed("terminal_stream_output", tmp_path) as stream,
    ):
        response = await create.post("/", json={"requestId": "r1"})
        assert response.status_code == 202, response.text
        name = response.json()["sessionId"]
        response = await status.get(f"/{name}")
        assert (response.status_code, response.json()["state"]) == (200, "requested")
        assert (await create.get("/")).status_code == 405
        assert (await status.get(f"/{name}", headers={"authorization": ""})).status_code == 401
        async with stream.stream("GET", f"/{name}") as events:
            assert events.headers["content-type"].startswith("text/event-stream")
            assert (await anext(events.aiter_lines())) == "event: state"


@pytest.mark.slow
async def test_a_function_whose_store_cannot_be_opened_tries_again(tmp_path: Path) -> None:
    """A container that starts while the disk is away must not answer 503 for the rest of its life."""
    blocker = tmp_path / "pigeon.db"
    token_secret(tmp_path)
    blocker.mkdir()
    async with deployed("terminal_list_sessions", tmp_path) as sessions:
        assert (await sessions.get("/")).status_code == 503
        blocker.rmdir()
        assert (await sessions.get("/")).status_code == 200
