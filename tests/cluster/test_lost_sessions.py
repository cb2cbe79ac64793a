"""Sessions whose pod is taken away, or whose workers are: who was in them is told why, and nothing of a transcript
is lost.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.cluster.cluster import processes
from tests.cluster.conftest import missing
from tests.cluster.deployment import Deployment
from tests.cluster.stacks import PATIENCE, guest, whole_stack
from tests.journeys.stack import Stack, User

pytestmark = pytest.mark.slow

Taking = Callable[[Deployment, str, str], None]  # the pod's name and uid

GRACE = ("--wait=false", "--grace-period=3")
LAST = 300_000
NUMBERS = b"".join(b"%d\r\n" % number for number in range(1, LAST + 1))
MANY = """import os, time
for _ in range(20):
    if os.fork() == 0:
        held = b"x" * (40 << 20)
        time.sleep(600)
time.sleep(600)"""  # small ones: the agent is the greediest, as it is made to seem
HUNG_UP = (("killed", None), ("exited", 128 + signal.SIGHUP))  # with its shell, or a moment before it
BUSY = "echo started; sleep 600"


def delete(deployment: Deployment, name: str, _: str) -> None:
    """As an operator does."""
    deployment.sandboxes.kubectl("delete", "pod", name, *GRACE)


def evict(deployment: Deployment, name: str, _: str) -> None:
    """As `kubectl drain` and cluster autoscalers do."""
    namespace = deployment.sandboxes.namespace
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": name, "namespace": namespace},
        "deleteOptions": {"gracePeriodSeconds": 3},
    }
    path = f"/api/v1/namespaces/{namespace}/pods/{name}/eviction"
    deployment.sandboxes.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))


def preempt(deployment: Deployment, name: str, _: str) -> None:
    """The scheduler's two calls, without a pod that would displace those of others on this node."""
    condition = {
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "PreemptionByScheduler",
        "lastTransitionTime": datetime.now(UTC).isoformat(timespec="seconds"),  # the controllers undo an old one
    }
    patch = json.dumps({"status": {"conditions": [condition]}})
    deployment.sandboxes.kubectl("patch", "pod", name, "--subresource=status", "-p", patch)
    delete(deployment, name, "")


@pytest.mark.parametrize(
    ("take", "words"),
    [
        (delete, "It was deleted."),
        (evict, "It was evicted: its node is being drained."),
        (preempt, "It was preempted: the cluster needed its place for more important work."),
    ],
)
async def test_a_pod_taken_away_with_notice_says_all_it_had_to_say(
    take: Taking, words: str, alice: User, deployment: Deployment
) -> None:
    """Its user reads everything that was printed, and who ended the session; the command did not end well."""
    session = await alice.ready()
    command = await started(alice, session)
    metadata = deployment.pod(session)["metadata"]
    take(deployment, metadata["name"], metadata["uid"])
    output = await alice.transcript(session, PATIENCE)
    status = await alice.status(session)
    assert (status["state"], status["reason"]) == ("closed", f"The session is closed. {words}")
    assert not output.gaps
    assert output.end == {"finalOffset": output.offset}
    record = await alice.ended(session, command)
    assert (record["state"], record["exitCode"]) in HUNG_UP


async def test_a_pod_deleted_by_force_says_so(alice: User, deployment: Deployment) -> None:
    """It is gone from the API before its shell is hung up: the user is told of the deletion, not of a signal."""
    session = await alice.ready()
    command = await started(alice, session)
    name = deployment.pod(session)["metadata"]["name"]
    deployment.sandboxes.kubectl("delete", "pod", name, "--force", "--grace-period=0")
    await alice.transcript(session, PATIENCE)
    assert (await alice.status(session))["reason"].endswith("t was deleted.")
    record = await alice.ended(session, command)
    assert (record["state"], record["exitCode"]) in (*HUNG_UP, ("lost", None))


async def test_an_agent_killed_from_the_node_is_a_lost_session(alice: User, deployment: Deployment) -> None:
    """Nobody is told that their program ended well: what is not known is marked as such, in the transcript too."""
    session = await alice.ready()
    command = await started(alice, session)
    os.kill(agent(deployment, session), signal.SIGKILL)
    reason = await lost(alice, session)
    assert reason.endswith(" has ended: it was killed from outside (signal 9).")
    record = await alice.ended(session, command)
    assert (record["state"], record["exitCode"]) == ("lost", None)


async def started(user: User, session: str) -> str:
    """A command that runs for long."""
    command = await user.execute(session, BUSY)
    await user.until_output(session, b"started\r\n")
    return command


def agent(deployment: Deployment, session: str) -> int:
    """The agent's process on the node; skips where the node is another machine."""
    found = processes(deployment.pod(session)["metadata"]["uid"])
    serving = [pid for pid in found if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    return serving[0] if serving else missing("the pods' node is another machine")


def seem_greedy(pid: int) -> None:
    """Have the kernel end this process first when its control group is out of memory."""
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


async def lost(user: User, session: str) -> str:
    """What is told of a session whose sandbox went without a word."""
    output = await user.transcript(session, PATIENCE)
    status = await user.status(session)
    assert status["state"] == "lost"
    assert output.gaps[-1]["length"] is None
    return str(status["reason"])


async def test_memory_that_ends_the_agent_is_named(alice: User, deployment: Deployment) -> None:
    """The kernel ends the greediest program of a session; where it took the agent, the session says what happened."""
    session = await alice.ready()
    seem_greedy(agent(deployment, session))
    await alice.execute(session, f"python3 -c '{MANY}'")
    reason = await lost(alice, session)
    assert reason.endswith(" has ended: it ran out of memory: the kernel ended it.")


@pytest.fixture
async def own_stack(deployment: Deployment, tmp_path: Path) -> AsyncIterator[Stack]:
    """A stack that the test may kill."""
    async with whole_stack(deployment, tmp_path) as found:
        yield found


async def test_a_stack_killed_in_the_middle_of_output_loses_no_byte(own_stack: Stack, deployment: Deployment) -> None:
    """kill -9: the pod goes on, the next worker attaches to it where the dead one had committed."""
    process = await own_stack.start()
    async with own_stack.user("alice") as alice:
        session = await alice.ready()
        uid = deployment.pod(session)["metadata"]["uid"]
        await alice.run(session, "KEPT=yes")
        command = await alice.execute(session, f"seq 1 {LAST}")
        await alice.until_output(session, b"\r\n1000\r\n")
        await own_stack.kill(process)
    own_stack.port = 0
    await own_stack.start()
    async with guest(own_stack, deployment, "alice") as alice:
        record = await alice.ended(session, command, PATIENCE)
        assert (record["state"], record["exitCode"]) == ("exited", 0)
        assert await alice.read(session, record["startOffset"], record["endOffset"]) == NUMBERS
        assert (await alice.run(session, "echo $KEPT"))[1] == b"yes\r\n"
        assert deployment.pod(session)["metadata"]["uid"] == uid
        await alice.call("DELETE", f"cleanup-session/{session}")
        output = await alice.transcript(session)
        assert not output.gaps
        assert NUMBERS in bytes(output.data)


async def test_a_pod_that_went_while_no_worker_lived_is_a_lost_session(
    own_stack: Stack, deployment: Deployment
) -> None:
    """The next worker finds it gone and says so; it gives the session no second pod."""
    process = await own_stack.start()
    async with own_stack.user("alice") as alice:
        session = await alice.ready()
        await started(alice, session)
        await own_stack.kill(process)
    name = deployment.pod(session)["metadata"]["name"]
    deployment.sandboxes.kubectl("delete", "pod", name, "--grace-period=1")
    own_stack.port = 0
    await own_stack.start()
    async with guest(own_stack, deployment, "alice") as alice:
        assert (await lost(alice, session)).endswith(" is not there any more.")
        assert deployment.pods() == []
