"""Runs one script in one sandbox: `python -m tests.isolation.driver`, with a request (JSON) on standard input.

It is a process of its own so that the same thing can be done as root and as a plain user. The answer, JSON on
standard output: the script's exit `code` and `output`, its `result` (what it left in result.json), and the `phase`
and `reason` of the sandbox afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from infra.local import bubblewrap
from infra.local.sandboxes import LocalSandboxes
from schemas.errors import AgentRefused, AgentUnreachable
from schemas.limits import MIB, Limits
from schemas.ports import Phase, Sandbox, SandboxSpec
from tests.isolation.shell import Shell, shell

GONE_SECONDS = 10.0


def spec(name: str) -> SandboxSpec:
    """A sandbox small enough to be filled quickly."""
    return SandboxSpec(
        name=name,
        session=f"s-{name}",
        memory_bytes=192 * MIB,
        workspace_bytes=24 * MIB,
        processes=40,
        file_bytes=16 * MIB,
        lifetime_seconds=600,
    )


async def carry_out(request: dict[str, Any]) -> dict[str, Any]:
    """Create, run, look, delete."""
    if not request["user_namespaces"]:
        # as where AppArmor keeps plain users from them
        mock.patch.object(bubblewrap, "user_namespaces", return_value=False).start()
    sandboxes = LocalSandboxes(Path(request["root"]), limits=Limits(), network=request["network"], unsafe=False)
    created = await sandboxes.create(spec(request["name"]))
    try:
        sandbox = await sandboxes.running(created.name, created.uid)
        answer: dict[str, Any] = {"code": None, "output": "", "result": None}
        with contextlib.suppress(AgentUnreachable):
            async with shell(sandboxes, sandbox) as opened:
                answer = await _run(opened, request)
        ended = await _after(sandboxes, sandbox)
        return {**answer, "phase": ended.phase, "reason": ended.reason}
    finally:
        await sandboxes.delete(created.name, created.uid)


async def _run(opened: Shell, request: dict[str, Any]) -> dict[str, Any]:
    await opened.write("script.py", request["script"].encode())
    await opened.write("arguments.json", json.dumps(request["arguments"]).encode())
    code, output = await opened.run("python3 /workspace/script.py", request["seconds"])
    await opened.run("true")  # the shell still takes commands
    result = None
    with contextlib.suppress(AgentRefused):
        result = json.loads(await opened.read("result.json"))
    return {"code": code, "output": output, "result": result}


async def _after(sandboxes: LocalSandboxes, sandbox: Sandbox) -> Sandbox:
    """The sandbox once the dust has settled: ended where its agent does not answer any more."""
    stream = None
    with contextlib.suppress(Exception):
        stream = await sandboxes.connect(sandbox.name, sandbox.uid)
        async with asyncio.timeout(GONE_SECONDS):
            if await stream.read(1):
                await stream.close()
                return await sandboxes.get(sandbox.name) or sandbox
    async with asyncio.timeout(GONE_SECONDS):
        ended = await sandboxes.gone(sandbox.name, sandbox.uid)
        assert ended.phase is Phase.ENDED
        return ended


if __name__ == "__main__":
    print(json.dumps(asyncio.run(carry_out(json.load(sys.stdin)))))
