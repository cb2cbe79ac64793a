"""Every Sandboxes keeps the contract."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from infra.local import sandbox_process
from infra.local.sandbox_record import OF, Record
from infra.local.sandboxes import LocalSandboxes
from schemas.errors import NoCapacity
from schemas.limits import Limits
from schemas.ports import Sandbox, Sandboxes, SandboxSpec
from tests.contracts.sandboxes_contract import CAPACITY, Lab, SandboxesContract, spec
from tests.contracts.waiting import soon

REPOSITORY = Path(__file__).parents[2]


class LocalLab:
    """Sandboxes on this machine, in bubblewrap or as plain processes."""

    def __init__(self, root: Path, python: Path, *, unsafe: bool) -> None:
        self.root = root
        self._python = python
        self._unsafe = unsafe
        self.sandboxes = self.peer = self._client()
        self.peer = self._client()

    def _client(self) -> Sandboxes:
        limits = Limits(capacity=CAPACITY)
        return LocalSandboxes(self.root, limits=limits, network="none", unsafe=self._unsafe, python=self._python)

    async def create_and_die(self, spec: SandboxSpec) -> None:
        async with self._child(spec=asdict(spec)) as child:
            assert await self._told(child) == "done"

    async def race_to_claim(self, sandbox: Sandbox, sessions: list[str]) -> list[str]:
        async with AsyncExitStack() as hired:
            children = [
                await hired.enter_async_context(self._child(claim=claim(sandbox, session))) for session in sessions
            ]
            told = await asyncio.gather(*map(self._told, children))
        assert set(told) == {"done", "conflict"}
        return [session for session, answer in zip(sessions, told, strict=True) if answer == "done"]

    @asynccontextmanager
    async def _child(self, **request: Any) -> AsyncIterator[Process]:
        """A process that is ready to carry out the request; it is killed on the way out."""
        local = {"root": str(self.root), "python": str(self._python), "unsafe": self._unsafe, "capacity": CAPACITY}
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.contracts.sandboxes_child", json.dumps({**local, **request})),
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

    async def _told(self, child: Process) -> str:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"go\n")
        return (await soon(child.stdout.readline())).decode().strip()

    def _record(self, sandbox: Sandbox) -> Record:
        return Record(self.root / f"{sandbox.name}{OF}{sandbox.uid}")

    async def kill(self, sandbox: Sandbox) -> None:
        process = self._record(sandbox).process("init")
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)

    async def traces(self, sandbox: Sandbox) -> set[str]:
        record = self._record(sandbox)
        meta, monitor, init = record.meta(), record.process("monitor"), record.process("init")
        assert meta is not None
        assert monitor is not None
        assert init is not None
        pids = [monitor.pid, *sandbox_process.descendants(monitor.pid)]
        assert init.pid in pids
        return {str(record.directory), *(f"/proc/{pid}" for pid in pids), *filter(os.path.exists, meta.cgroups)}

    async def still_there(self, traces: set[str]) -> set[str]:
        return set(filter(exists, traces))


def claim(sandbox: Sandbox, session: str) -> dict[str, str]:
    """The arguments of a claim."""
    return {"name": sandbox.name, "uid": sandbox.uid, "session": session}


def exists(path: str) -> bool:
    """Whether it is there; a process that only waits for the machine's init to reap it is not."""
    try:
        return ") Z " not in Path(path, "stat").read_text() if path.startswith("/proc/") else os.path.exists(path)
    except OSError:
        return False


@asynccontextmanager
async def local_lab(folder: Path, python: Path, *, unsafe: bool) -> AsyncIterator[Lab]:
    """Clean up what a failed test leaves."""
    lab = LocalLab(folder / "sandboxes", python, unsafe=unsafe)
    try:
        yield lab
    finally:
        for sandbox in await lab.sandboxes.list():
            await lab.sandboxes.delete(sandbox.name, sandbox.uid)


@pytest.fixture(params=["bubblewrap", "unsafe"])
async def lab(request: pytest.FixtureRequest, tmp_path: Path, python: Path) -> AsyncIterator[Lab]:
    """An empty runtime, for each implementation."""
    async with local_lab(tmp_path, python, unsafe=request.param == "unsafe") as lab:
        yield lab


class TestSandboxes(SandboxesContract):
    """The contract, on each of them."""

    async def test_claims_do_not_exceed_the_capacity(self, lab: Lab) -> None:
        """Several workers that claim at the same moment never make one session more than there is room for."""
        warm = [await lab.sandboxes.create(spec(f"w{each}")) for each in range(CAPACITY + 1)]
        claims = (lab.peer.claim(each.name, each.uid, f"s-{each.name}") for each in warm)
        answers = await asyncio.gather(*claims, return_exceptions=True)
        assert sorted(type(answer).__name__ for answer in answers) == ["NoCapacity", *["Sandbox"] * CAPACITY]
        last = next(each for each, answer in zip(warm, answers, strict=True) if isinstance(answer, NoCapacity))
        taken = next(each for each in warm if each is not last)
        await lab.sandboxes.delete(taken.name, taken.uid)
        assert (await lab.sandboxes.claim(last.name, last.uid, "s-late")).session == "s-late"
