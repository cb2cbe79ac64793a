"""A shell in a sandbox, over the agent's real protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import consumers.agent.agent as wire
from consumers.agent.client import AgentConnection, AgentControl, attach, connect, open_shell
from schemas.ports import Sandbox, Sandboxes

KEY = bytes(range(32)).hex()


class Shell:
    """One session's shell: commands in, their exit codes and output out."""

    def __init__(self, control: AgentControl, stream: AgentConnection) -> None:
        self._control = control
        self._stream = stream
        self._numbers = itertools.count(1)

    async def run(self, text: str, seconds: float = 60.0) -> tuple[int | None, str]:
        """The exit code and the output of a command. Raises AgentUnreachable where the sandbox ends under it."""
        number = next(self._numbers)
        await self._control.request(
            "run", id=f"r{number}", number=number, commandId=f"c{number}", text=text, timeoutSeconds=int(seconds)
        )
        output = bytearray()
        async with asyncio.timeout(seconds + 10):
            while True:
                kind, argument, payload = await self._stream.receive()
                if kind in (wire.OUT, wire.ECHO):
                    output += payload
                    await self._stream.send(wire.ACK, argument + len(payload))
                elif kind == wire.MARK:
                    mark: dict[str, Any] = json.loads(payload)
                    if mark["kind"] == "finished" and mark["commandId"] == f"c{number}":
                        return mark["exitCode"], output.decode(errors="replace").replace("\r\n", "\n")

    async def write(self, path: str, content: bytes) -> None:
        """Write a file of the workspace."""
        file = {"path": path, "type": "file", "data": base64.b64encode(content).decode()}
        await self._control.request("write", id=f"w{path}", files=[file])

    async def read(self, path: str) -> bytes:
        """The content of a file of the workspace. Raises AgentRefused."""
        return base64.b64decode((await self._control.request("read", path=path, limit=1 << 20))["data"])


@asynccontextmanager
async def shell(sandboxes: Sandboxes, sandbox: Sandbox) -> AsyncIterator[Shell]:
    """Open a sandbox's shell."""
    name, uid = sandbox.name, sandbox.uid
    stream = await connect(await sandboxes.connect(name, uid))
    control = AgentControl(await connect(await sandboxes.connect(name, uid)))
    try:
        await open_shell(stream, KEY, rows=24, cols=80)
        await attach(stream, KEY, epoch=1, offset=0)
        await control.start(KEY)
        yield Shell(control, stream)
    finally:
        await stream.close()
        await control.close()
