"""The real kubectl works with the API server of the tests."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contracts.waiting import soon
from tests.kube.client import pod
from tests.kube.server import ApiServer

ATTACH = ("python3", "agent", "attach", "--socket", "@agent")


class Kubectl:
    """kubectl with a kubeconfig of the server."""

    def __init__(self, program: str, environment: dict[str, str]) -> None:
        self._program = program
        self._environment = environment

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        """Start it; the caller ends it."""
        return await asyncio.create_subprocess_exec(
            self._program, *arguments, env=self._environment, stdin=PIPE, stdout=PIPE, stderr=PIPE
        )

    async def run(self, *arguments: str, stdin: bytes = b"") -> tuple[int | None, bytes, bytes]:
        """Exit code, standard output and standard error."""
        process = await self.start(*arguments)
        try:
            out, err = await soon(process.communicate(stdin), timeout=60)
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()
        return process.returncode, out, err

    async def ok(self, *arguments: str, stdin: bytes = b"") -> str:
        """What it says when it succeeds."""
        code, out, err = await self.run(*arguments, stdin=stdin)
        assert code == 0, err.decode()
        return out.decode()


@pytest.fixture
def kubectl(api: ApiServer, tmp_path: Path) -> Kubectl:
    """Skips on a laptop without kubectl, fails in CI."""
    program = shutil.which("kubectl")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("kubectl is missing")
        pytest.skip("kubectl is not installed")
    config = api.kubeconfig(tmp_path / "kubeconfig", token="admin-token")
    return Kubectl(program, {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "KUBECONFIG": str(config)})


@pytest.mark.slow
async def test_a_pod_is_applied_waited_for_shown_and_deleted(kubectl: Kubectl) -> None:
    """What an operator does by hand."""
    body = json.dumps(pod("one")).encode()
    assert await kubectl.ok("apply", "-f", "-", stdin=body) == "pod/one created\n"
    assert "condition met" in await kubectl.ok("wait", "--for=condition=Ready", "pod/one", "--timeout=30s")
    shown = (await kubectl.ok("get", "pods", "-l", "app=test")).splitlines()
    assert shown[0].split() == ["NAME", "READY", "STATUS", "RESTARTS", "AGE"]
    assert shown[1].split()[:4] == ["one", "1/1", "Running", "0"]
    again = json.dumps({**pod("one"), "metadata": {"name": "one", "labels": {"app": "other"}}}).encode()
    assert await kubectl.ok("apply", "-f", "-", stdin=again) == "pod/one configured\n"
    assert await kubectl.ok("get", "pod", "one", "-o", "jsonpath={.metadata.labels}") == '{"app":"other"}'
    assert await kubectl.ok("delete", "pod", "one", "--grace-period=5") == 'pod "one" deleted\n'
    assert await kubectl.ok("get", "pods", "-o", "name") == ""


@pytest.mark.slow
async def test_changes_are_watched(kubectl: Kubectl, api: ApiServer) -> None:
    """`get -w` prints a line for each."""
    held = api.faults.hold_pods("image")
    process = await kubectl.start("get", "pods", "-w", "--no-headers")
    assert process.stdout is not None
    try:
        await kubectl.ok("apply", "-f", "-", stdin=json.dumps(pod("one")).encode())
        seen = [line async for line in _statuses(process.stdout, "ImagePullBackOff")]
        held.lift()
        seen += [line async for line in _statuses(process.stdout, "Running")]
    finally:
        process.kill()
        await process.communicate()
    assert (seen[-1], "ImagePullBackOff" in seen) == ("Running", True)


async def _statuses(lines: asyncio.StreamReader, until: str) -> AsyncIterator[str]:
    while line := await soon(lines.readline(), timeout=60):
        status = line.split()[2].decode()
        yield status
        if status == until:
            return


@pytest.mark.slow
async def test_commands_are_executed(kubectl: Kubectl) -> None:
    """Output, input and exit codes go through, and so does the agent's greeting."""
    await kubectl.ok("apply", "-f", "-", stdin=json.dumps(pod("one")).encode())
    await kubectl.ok("wait", "--for=condition=Ready", "pod/one", "--timeout=30s")
    code, out, err = await kubectl.run("exec", "one", "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (code, out, err.splitlines()[0]) == (3, b"out\n", b"err")
    data = bytes(range(256)) * 2_000
    assert await kubectl.run("exec", "-i", "one", "--", "cat", stdin=data) == (0, data, b"")
    code, out, _ = await kubectl.run("exec", "-i", "one", "--", *ATTACH)
    assert code == 0
    code, _, err = await kubectl.run("exec", "one", "--", "no-such-program")
    assert code == 1
    assert b"Internal error" in err


@pytest.mark.slow
async def test_a_full_namespace_is_told(kubectl: Kubectl, api: ApiServer) -> None:
    """The quota's words reach the operator."""
    api.put_quota("sessions", {"pods": "0"})
    code, _, err = await kubectl.run("apply", "-f", "-", stdin=json.dumps(pod("one")).encode())
    assert code == 1
    assert b"exceeded quota: sessions, requested: pods=1, used: pods=0, limited: pods=0" in err
