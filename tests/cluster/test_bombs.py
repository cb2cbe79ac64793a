"""Whatever a session uses up, it ends nothing but itself, and says what it died of."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.cluster.deployment import Deployment
from tests.cluster.stacks import PATIENCE
from tests.journeys.stack import User
from tests.waiting import until

pytestmark = pytest.mark.slow

FORK = """import os, signal, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
full = False
while True:
    try:
        os.fork()
    except OSError as error:
        full = full or print(error.strerror, flush=True) or True
        time.sleep(1)"""
RESTLESS = """import os, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
full = False
while True:
    try:
        os.fork()
    except OSError as error:
        full = full or print(error.strerror, flush=True) or True"""
IN_THE_BACKGROUND = "bomb() { bomb | bomb & }; bomb"
MEMORY = 'held = [b"x" * (1 << 20) for _ in range(4096)]'
DISK = "for each in 1 2; do head -c 200M /dev/zero >full$each; done; echo written; sleep 600"
FULL = 't was evicted from its node: Usage of EmptyDir volume "workspace" exceeds the limit "268435456".'
OUT_OF_MEMORY = "it ran out of memory: the kernel ended it."  # of a sandbox that is ended as a whole, on cgroup v2


@asynccontextmanager
async def unimpressed(neighbour: User) -> AsyncIterator[None]:
    """A neighbour's session that answers all the while, and once more at the end."""
    session = await neighbour.ready()
    answers: list[bytes] = []

    async def use() -> None:
        while True:
            answers.append((await neighbour.run(session, f"sleep 2; echo {len(answers)}"))[1])

    using = asyncio.create_task(use())
    try:
        yield
        before = len(answers)

        async def again() -> bool:
            return len(answers) > before + 1 or using.done()

        await until(again, "the neighbour's session answers once more", PATIENCE)
        assert not using.done()
    finally:
        using.cancel()
        await asyncio.gather(using, return_exceptions=True)
    assert answers == [b"%d\r\n" % number for number in range(len(answers))]


@pytest.mark.parametrize("bomb", [FORK, RESTLESS], ids=["rests", "restless"])
async def test_a_fork_bomb_is_ended_by_ctrl_c(alice: User, bob: User, deployment: Deployment, bomb: str) -> None:
    """While it holds every process that its session may have, a worker still gets in; afterwards all is as before."""
    session = await alice.ready()
    pod = deployment.pod(session)["metadata"]["name"]
    async with unimpressed(bob):
        command = await alice.execute(session, f"python3 -c '{bomb}'")
        await alice.until_output(session, b"Resource temporarily unavailable")
        await asyncio.to_thread(deployment.sandboxes.kubectl, "exec", pod, "--", "true")
        await alice.call("POST", "signal", json={"sessionId": session, "signal": "INT"})
        record = await alice.ended(session, command, PATIENCE)
        assert (record["state"], record["exitCode"]) == ("exited", 130)
        assert (await alice.run(session, "echo on"))[1] == b"on\r\n"


async def test_a_fork_bomb_in_the_background_is_ended_by_its_user(alice: User, bob: User) -> None:
    """Ctrl-C is for the foreground, as in any terminal; the shell needs no process to kill all of its user's others."""
    session = await alice.ready()
    async with unimpressed(bob):
        await alice.run(session, IN_THE_BACKGROUND)
        await alice.until_output(session, b"Resource temporarily unavailable")
        await alice.run(session, "kill -9 -1")
        record, output = await alice.run(session, "ls -d /")
        assert (record["exitCode"], output) == (0, b"/\r\n")


async def test_a_memory_bomb_ends_at_most_its_session(alice: User, bob: User) -> None:
    """Where the kernel ends one program the shell says so and goes on; where it ends all, the session says so."""
    session = await alice.ready()
    async with unimpressed(bob):
        record = await alice.ended(session, await alice.execute(session, f"python3 -c '{MEMORY}'"), PATIENCE)
        status = await alice.status(session)
        if status["state"] == "ready":
            assert (record["state"], record["exitCode"]) == ("exited", 137)
            output = await alice.read(session, record["startOffset"], record["endOffset"])
            assert output == b"Killed\r\n"
            assert (await alice.run(session, "echo on"))[1] == b"on\r\n"
        else:
            assert record["state"] == status["state"] == "lost"
            assert status["reason"].endswith(OUT_OF_MEMORY)


async def test_a_full_disk_ends_its_session_and_is_named(alice: User, bob: User) -> None:
    """The node takes the pod away once its workspace has more in it than it was promised, and the user is told that."""
    session = await alice.ready()
    async with unimpressed(bob):
        command = await alice.execute(session, DISK)
        await alice.transcript(session, PATIENCE)
        assert (await alice.status(session))["reason"].endswith(FULL)
        record = await alice.ended(session, command)
        assert record["state"] in ("killed", "lost", "exited")  # the kubelet leaves it a second to tell of its end
        assert record["exitCode"] in (None, 128 + signal.SIGHUP)
