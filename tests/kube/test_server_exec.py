"""exec on the API server of the tests behaves like a real one, in both protocols."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.contracts.waiting import soon
from tests.kube.answers import Object
from tests.kube.client import PODS, Client, client
from tests.kube.execs import V4, V5
from tests.kube.faults import Fault
from tests.kube.server import ApiServer

ATTACH = ["python3", "agent", "attach", "--socket", "@agent"]
STDIN, STDOUT, STDERR, STATUS = b"\0", b"\1", b"\2", b"\3"
CLOSE_STDIN = b"\xff\0"


@pytest.fixture
async def kube(api: ApiServer) -> AsyncIterator[Client]:
    """A worker's client of a server with one pod that runs."""
    async with client(api) as found:
        await found.create("one")
        await found.phase("one", "Running")
        yield found


async def read(socket: aiohttp.ClientWebSocketResponse) -> tuple[dict[bytes, bytes], Object | None]:
    """All that comes, by channel, and the status if there is one."""
    got = {STDOUT: b"", STDERR: b""}
    async for message in socket:
        channel, data = message.data[:1], message.data[1:]
        if channel == STATUS:
            return got, json.loads(data)
        got[channel] += data
    return got, None


@pytest.mark.parametrize("protocol", [V4, V5])
async def test_output_and_exit_code_come_back(kube: Client, protocol: str) -> None:
    """Output, errors and the code each come on their channel."""
    async with kube.executing("one", ["sh", "-c", "echo out; echo err >&2; exit 3"], protocol) as socket:
        assert await socket.receive_bytes() == STDOUT, "an empty frame says that the connection is established"
        got, status = await soon(read(socket))
    assert got == {STDOUT: b"out\n", STDERR: b"err\n"}
    assert status is not None
    assert (status["reason"], status["details"]["causes"]) == (
        "NonZeroExitCode",
        [{"reason": "ExitCode", "message": "3"}],
    )


async def test_stdin_is_closed_by_the_newer_protocol(kube: Client) -> None:
    """cat ends when its input does."""
    data = bytes(range(256)) * 1_000
    async with kube.executing("one", ["cat"]) as socket:
        await socket.send_bytes(STDIN + data)
        await socket.send_bytes(CLOSE_STDIN)
        got, status = await soon(read(socket))
    assert (got[STDOUT], status) == (data, {"metadata": {}, "status": "Success"})


async def test_the_older_protocol_knows_no_end_of_input(kube: Client) -> None:
    """The bytes that would close it are not for anybody there."""
    async with kube.executing("one", ["head", "-c", "2"], V4) as socket:
        await socket.send_bytes(CLOSE_STDIN)
        await socket.send_bytes(STDIN + b"ab")
        got, status = await soon(read(socket))
    assert (got[STDOUT], status) == (b"ab", {"metadata": {}, "status": "Success"})


async def test_a_command_that_is_not_there_is_an_internal_error(kube: Client) -> None:
    """As container runtimes have it: no exit code."""
    async with kube.executing("one", ["no-such-program"]) as socket:
        _, status = await soon(read(socket))
    assert status is not None
    assert (status["reason"], "details" in status) == ("InternalError", False)


async def test_the_helper_reaches_the_agent_until_either_side_ends(kube: Client) -> None:
    """Whoever closes standard input ends the helper, with success."""
    async with kube.executing("one", ATTACH) as socket:
        assert await socket.receive_bytes() == STDOUT
        assert b'"challenge"' in await soon(socket.receive_bytes())
        await socket.send_bytes(CLOSE_STDIN)
        _, status = await soon(read(socket))
    assert status == {"metadata": {}, "status": "Success"}


async def test_a_killed_pod_kills_its_helpers(kube: Client) -> None:
    """What was executed in a container goes with it."""
    async with kube.executing("one", ATTACH) as socket:
        await kube.server.kubelet.kill("one")
        _, status = await soon(read(socket))
    assert status is not None
    assert status["details"]["causes"][0]["message"] == "137"


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({}, "at least 1 command"),
        ({"command": "ls"}, "at least 1 of stdin"),
        ({"command": "ls", "stdout": "true", "container": "other"}, "container other is not valid for pod one"),
        ({"command": "ls", "stdout": "true"}, "Upgrade request required"),
    ],
)
async def test_an_exec_that_makes_no_sense_is_refused(kube: Client, query: dict[str, Any], said: str) -> None:
    """Before anything is upgraded."""
    refused = await kube.call("GET", f"{PODS}/one/exec", expect=400, **query)
    assert said in refused["message"]


async def test_a_pod_that_does_not_run_has_no_container(api: ApiServer) -> None:
    """The newer protocol tells it in the stream, the older one refuses the upgrade; without a node both do."""
    api.faults.hold_pods("unschedulable")
    held = api.faults.hold_pods("slow", times=2)
    async with client(api) as kube:
        await kube.create("homeless")
        await kube.create("one")
        await kube.phase("homeless", "Pending")
        with pytest.raises(aiohttp.WSServerHandshakeError, match="400"):
            async with kube.executing("homeless", ATTACH):
                pass
        with pytest.raises(aiohttp.WSServerHandshakeError, match="500"):
            async with kube.executing("one", ATTACH, V4):
                pass
        async with kube.executing("one", ATTACH, V5) as socket:
            _, status = await soon(read(socket))
        assert status is not None
        assert "container not found" in status["message"]
        held.lift()
        await kube.phase("one", "Running")
        with pytest.raises(aiohttp.WSServerHandshakeError, match="404"):
            async with kube.executing("none", ATTACH):
                pass


@pytest.mark.parametrize("cut", [0, 1, 14, 60, 100_000])
async def test_an_exec_is_cut_at_any_byte(kube: Client, cut: int) -> None:
    """Exactly that many bytes of output come, and no status."""
    kube.server.faults.add(Fault(path="/exec", cut=cut))
    script = ["sh", "-c", "head -c 300000 /dev/zero; sleep 60"]
    async with kube.executing("one", script) as socket:
        got, status = await soon(read(socket))
    assert (len(got[STDOUT]), status) == (cut, None)


async def test_a_frozen_exec_stands_still_and_open(kube: Client) -> None:
    """Neither an end nor a byte comes, and what is sent goes nowhere."""
    kube.server.faults.add(Fault(path="/exec", freeze=5))
    async with kube.executing("one", ["cat"]) as socket:
        assert await socket.receive_bytes() == STDOUT
        await socket.send_bytes(STDIN + b"1234567")
        assert await soon(socket.receive_bytes()) == STDOUT + b"12345"
        with pytest.raises(TimeoutError):
            await socket.receive(timeout=0.1)
