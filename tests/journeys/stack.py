"""A whole embedded stack in processes of its own, and a client that speaks as the frontend does."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx

from infra.local.keys import token_secret
from infra.local.presence import FILE
from producers.identity import sign_local_token
from tests.waiting import until

START_SECONDS = 40.0  # the first start makes the sandboxes' Python
PATIENCE = 30.0
ALL_ROLES = "gateway,worker,ticker"


@dataclass
class Stack:
    """Processes of `pigeon up` on one state folder; every role can be started, and killed, by itself."""

    state: Path
    environment: dict[str, str] = field(default_factory=dict)
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)
    port: int = 0

    async def start(self, roles: str = ALL_ROLES) -> asyncio.subprocess.Process:
        """Start a process; returns once it serves, for the gateway, or at once."""
        with (self.state.parent / "stack.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "infra.cli", "up", "--port", str(self.port), "--roles", roles),
                env={**os.environ, "PIGEON_STATE": str(self.state), **self.environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
            )
        self.processes.append(process)
        if "gateway" in roles:
            await self._serving(process)
        return process

    async def _serving(self, process: asyncio.subprocess.Process) -> None:
        async def announced() -> bool:
            if process.returncode is not None:
                raise AssertionError(f"pigeon up ended: {self.log()}")
            with contextlib.suppress(OSError, ValueError):
                presence = json.loads((self.state / FILE).read_text())
                if presence["pid"] == process.pid:
                    self.port = presence["port"]
            return self.port > 0

        await until(announced, "the gateway listens", START_SECONDS)

    def log(self) -> str:
        """What the processes printed."""
        return (self.state.parent / "stack.log").read_text(errors="replace")

    def user(self, name: str = "alice", **claims: Any) -> User:
        """A signed-in user's client."""
        token = sign_local_token(token_secret(self.state), name, timedelta(hours=1), **claims)
        return User(self, token)

    async def kill(self, process: asyncio.subprocess.Process) -> None:
        """kill -9, and wait until it is gone."""
        process.send_signal(signal.SIGKILL)
        await process.wait()

    async def stop(self) -> None:
        """Ctrl-C on everything that still runs."""
        for process in self.processes:
            if process.returncode is None:
                process.send_signal(signal.SIGINT)
        for process in self.processes:
            async with asyncio.timeout(START_SECONDS):
                await process.wait()


@dataclass
class Output:
    """What a stream has said so far."""

    data: bytearray = field(default_factory=bytearray)
    offset: int = 0
    gaps: list[dict[str, Any]] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None


class User:
    """The HTTP functions, called by one user."""

    def __init__(self, stack: Stack, token: str) -> None:
        self._stack = stack
        self._token = token
        self.http = httpx.AsyncClient(headers={"authorization": f"Bearer {token}"}, timeout=PATIENCE)

    async def __aenter__(self) -> User:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._stack.port}/terminal-{name}"

    async def call(self, method: str, name: str, *, expect: int = 202, **request: Any) -> dict[str, Any]:
        """Call a function; anything but the expected status fails the test with the answer's text."""
        response = await self.http.request(method, self.url(name), **request)
        assert response.status_code == expect, f"{name}: {response.status_code} {response.text}"
        answer: dict[str, Any] = response.json() if response.content else {}
        return answer

    async def create(self, **body: Any) -> str:
        """Ask for a session; returns its id."""
        answer = await self.call("POST", "create-session", json=body)
        return str(answer["sessionId"])

    async def status(self, session: str) -> dict[str, Any]:
        return await self.call("GET", f"get-status/{session}", expect=200)

    async def until(self, session: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Watch the session's status until it is as wanted."""
        async with asyncio.timeout(PATIENCE):
            async for event, value in self.events(session):
                if event == "state" and condition(value):
                    return value
        raise AssertionError("the stream ended before the session was as wanted")

    async def ready(self, **body: Any) -> str:
        """A session whose shell runs."""
        session = await self.create(**body)
        await self.until(session, lambda status: status["state"] == "ready")
        return session

    async def execute(self, session: str, command: str, **body: Any) -> str:
        """Submit a command; returns its id."""
        body = {"sessionId": session, "command": command, **body}
        return str((await self.call("POST", "execute-command", json=body))["commandId"])

    async def type(self, session: str, data: bytes) -> None:
        """Send input as keystrokes."""
        body = {"sessionId": session, "data": base64.b64encode(data).decode(), "encoding": "base64"}
        await self.call("POST", "send-input", json=body)

    async def command(self, session: str, command: str) -> dict[str, Any] | None:
        """What is recorded of a command, or None, however many came before it."""
        after = 0
        while page := await self._commands(session, after):
            for entry in page:
                if entry["commandId"] == command:
                    return entry
            after = page[-1]["number"]
        return None

    async def _commands(self, session: str, after: int) -> list[dict[str, Any]]:
        answer = await self.call("GET", f"list-commands/{session}", expect=200, params={"after": after})
        found: list[dict[str, Any]] = answer["commands"]
        return found

    async def run(self, session: str, text: str, **body: Any) -> tuple[dict[str, Any], bytes]:
        """Submit a command and await its end; returns its record and exactly what it printed."""
        command = await self.execute(session, text, **body)
        record = await self.ended(session, command)
        if record["startOffset"] is None:
            return record, b""
        output = await self.read(session, record["startOffset"], record["endOffset"])
        return record, output

    async def ended(self, session: str, command: str, patience: float = PATIENCE) -> dict[str, Any]:
        """Wait until the command has an end."""

        async def end() -> dict[str, Any] | None:
            record = await self.command(session, command)
            return record if record is not None and record["state"] in ("exited", "killed", "lost") else None

        return await until(end, f"command {command} has an end", patience)

    async def read(self, session: str, start: int, end: int) -> bytes:
        """The transcript's bytes from `start` to `end`."""
        collected = bytearray()
        if start >= end:
            return b""
        async with asyncio.timeout(PATIENCE):
            async for event, value in self.events(session, start):
                if event == "message":
                    collected += base64.b64decode(value["data"])
                if start + len(collected) >= end:
                    return bytes(collected[: end - start])
        raise AssertionError(f"the transcript ended before offset {end}")

    async def until_output(self, session: str, text: bytes, start: int = 0) -> bytes:
        """Follow the transcript from `start` until it holds `text`; returns what was seen."""
        seen = bytearray()
        async with asyncio.timeout(PATIENCE):
            async for event, value in self.events(session, start):
                if event == "message":
                    seen += base64.b64decode(value["data"])
                    if text in seen:
                        return bytes(seen)
        raise AssertionError(f"the transcript ended without {text!r}: {bytes(seen)!r}")

    async def transcript(self, session: str, patience: float = PATIENCE) -> Output:
        """The whole transcript of a session, to its end, with every offset checked."""
        output = Output()
        async with asyncio.timeout(patience):
            async for event, value in self.events(session):
                if event == "message":
                    assert value["offset"] == output.offset, "a gap or a double in the transcript"
                    data = base64.b64decode(value["data"])
                    output.data += data
                    output.offset += len(data)
                elif event == "gap":
                    output.gaps.append(value)
                    output.offset += value["length"] or 0
                elif event == "state":
                    output.states.append(value)
                elif event == "end":
                    output.end = value
        return output

    async def events(self, session: str, start: int = 0) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Server-sent events from `start`, as (name, value)."""
        url = self.url(f"stream-output/{session}")
        async with self.http.stream("GET", url, params={"from": start}) as response:
            if response.status_code != 200:
                raise AssertionError(f"{response.status_code} {(await response.aread()).decode()}")
            name, data = "message", ""
            async for line in response.aiter_lines():
                if line.startswith("event:"):
                    name = line[6:].strip()
                elif line.startswith("data:"):
                    data += line[5:].strip()
                elif not line and data:
                    yield name, json.loads(data)
                    name, data = "message", ""
