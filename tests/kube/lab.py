"""The contract's lab for sandboxes that are pods, whichever API server keeps them."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from infra.adapters.kube import KubeSandboxes, kube_sandboxes
from infra.adapters.kube_settings import KubeSettings
from schemas.ports import Sandbox, SandboxSpec
from tests.contracts.waiting import soon

REPOSITORY = Path(__file__).parents[2]


class Node(Protocol):
    """What can be done to pods, and seen of them, where they run."""

    async def kill(self, sandbox: Sandbox) -> None:
        """Kill its agent with SIGKILL."""

    async def traces(self, sandbox: Sandbox) -> set[str]:
        """What exists on the node because of it."""

    async def still_there(self, traces: set[str]) -> set[str]:
        """Which of them exist now."""


class KubeLab:
    """Two clients of one namespace, and its node."""

    def __init__(self, settings: KubeSettings, sandboxes: KubeSandboxes, peer: KubeSandboxes, node: Node) -> None:
        self.settings = settings
        self.sandboxes = sandboxes
        self.peer = peer
        self._node = node

    async def create_and_die(self, spec: SandboxSpec) -> None:
        """See the contract's Lab."""
        async with self._child(spec=asdict(spec)) as child:
            assert await _told(child) == "done"

    async def race_to_claim(self, sandbox: Sandbox, sessions: list[str]) -> list[str]:
        """See the contract's Lab."""
        claims = [{"name": sandbox.name, "uid": sandbox.uid, "session": session} for session in sessions]
        async with AsyncExitStack() as hired:
            children = [await hired.enter_async_context(self._child(claim=claim)) for claim in claims]
            told = await asyncio.gather(*map(_told, children))
        assert set(told) == {"done", "conflict"}
        return [session for session, answer in zip(sessions, told, strict=True) if answer == "done"]

    @asynccontextmanager
    async def _child(self, **request: Any) -> AsyncIterator[Process]:
        """A process that is ready to carry out the request; it is killed on the way out."""
        settings = self.settings.model_dump(mode="json")
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.kube.child", json.dumps({"settings": settings, **request})),
            stdin=PIPE,
            stdout=PIPE,
            cwd=REPOSITORY,
        )
        assert child.stdout is not None
        try:
            assert await soon(child.stdout.readline()) == b"ready\n"
            yield child
        finally:
            child.kill()
            await child.wait()

    async def kill(self, sandbox: Sandbox) -> None:
        """See the contract's Lab."""
        await self._node.kill(sandbox)

    async def traces(self, sandbox: Sandbox) -> set[str]:
        """See the contract's Lab."""
        return await self._node.traces(sandbox)

    async def still_there(self, traces: set[str]) -> set[str]:
        """See the contract's Lab."""
        return await self._node.still_there(traces)


async def _told(child: Process) -> str:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(b"go\n")
    return (await soon(child.stdout.readline())).decode().strip()


@asynccontextmanager
async def kube_lab(settings: KubeSettings, node: Node) -> AsyncIterator[KubeLab]:
    """An empty namespace's lab; what a failed test leaves is removed."""
    async with kube_sandboxes(settings) as sandboxes, kube_sandboxes(settings) as peer:
        try:
            yield KubeLab(settings, sandboxes, peer, node)
        finally:
            left = await sandboxes.list()
            await asyncio.gather(*(sandboxes.delete(sandbox.name, sandbox.uid) for sandbox in left))
