"""Bad days of a cluster, seen by a person in a session: what is shown, and that no byte is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from consumers.tend_session import CAUSE_SECONDS
from infra.adapters.kube_pod import GRACE_SECONDS
from tests.contracts.waiting import soon
from tests.journeys.conftest import MakeStack, make_stack
from tests.journeys.stack import Stack, User
from tests.kube.client import PODS as POD_PATH
from tests.kube.client import client
from tests.kube.faults import Fault
from tests.kube.rights import WORKER
from tests.kube.server import ApiServer
from tests.waiting import until

__all__ = ["make_stack"]

LAST = 100_000
NUMBERS = b"".join(b"%d\r\n" % number for number in range(1, LAST + 1))
PODS = "/pods"
CREDENTIAL = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential"}


class Cluster:
    """Stacks on one API server."""

    def __init__(self, api: ApiServer, make: MakeStack, config: Path) -> None:
        self.api = api
        self.config = config
        self._make = make

    async def start(self, *roles: str) -> tuple[Stack, list[asyncio.subprocess.Process]]:
        """A stack without warm pods, as these processes."""
        stack = self._make(
            PIGEON_SANDBOXES="kubernetes",
            PIGEON_KUBE=json.dumps({"access": "kubeconfig", "kubeconfig": str(self.config)}),
            PIGEON_LIMITS_POOL_SIZE="0",
            PIGEON_TICK_SECONDS="1",
        )
        return stack, [await stack.start(each) for each in roles or ("gateway,worker,ticker",)]

    def pod(self) -> str:
        """The name of the only pod."""
        (pod,) = self.api.etcd.all("pods")
        return str(pod["metadata"]["name"])


@pytest.fixture
async def cluster(api: ApiServer, make_stack: MakeStack, tmp_path: Path) -> Cluster:
    """The API server, which outlives the stacks on it."""
    return Cluster(api, make_stack, api.kubeconfig(tmp_path / "kubeconfig"))


@pytest.fixture
async def alice(cluster: Cluster) -> AsyncIterator[User]:
    """A signed-in user of a whole stack."""
    stack, _ = await cluster.start()
    async with stack.user("alice") as user:
        yield user


async def exact(user: User, session: str, command: str) -> None:
    """The command ended well, and its output is every number once."""
    record = await user.ended(session, command)
    assert (record["state"], record["exitCode"]) == ("exited", 0)
    assert await user.read(session, record["startOffset"], record["endOffset"]) == NUMBERS


@pytest.mark.slow
async def test_connections_cut_anywhere_cost_no_byte(cluster: Cluster, alice: User) -> None:
    """Output goes on from the last committed offset, however often and wherever the exec is cut."""
    for cut in (0, 1, 13, 500, 20_000, 100_001, 250_000):
        cluster.api.faults.add(Fault("GET", "/exec", cut=cut))
    session = await alice.ready()
    await exact(alice, session, await alice.execute(session, f"seq 1 {LAST}"))
    assert (await alice.run(session, "echo done"))[1] == b"done\r\n"


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_connection_that_freezes_is_replaced(cluster: Cluster, alice: User) -> None:
    """Open and silent: the keepalives of the agent's protocol notice, and the output goes on without a gap."""
    cluster.api.faults.add(Fault("GET", "/exec", freeze=100_000))
    session = await alice.ready()
    command = await alice.execute(session, f"seq 1 {LAST}")
    await alice.ended(session, command, patience=150.0)
    await exact(alice, session, command)


async def test_a_busy_api_server_only_delays_a_start(cluster: Cluster, alice: User) -> None:
    """Told to come again later, interrupted or answered with an error: the session starts all the same."""
    faults = cluster.api.faults
    faults.add(Fault("POST", PODS, status=429, retry_after=1))
    faults.add(Fault("POST", PODS, status=500))
    faults.add(Fault("POST", PODS, drop="after"))
    faults.add(Fault("GET", "watch=1", cut=300))
    faults.add(Fault("GET", "watch=1", status=410))
    faults.add(Fault("GET", "/exec", status=500, times=2))
    session = await alice.ready()
    assert (await alice.run(session, "echo hello"))[1] == b"hello\r\n"
    assert len(cluster.api.etcd.all("pods")) == 1


async def _preempted(api: ApiServer, name: str) -> None:
    api.kubelet.preempt(name)


async def _drained(api: ApiServer, name: str) -> None:
    api.kubelet.drain(name)


async def _cleared_away(api: ApiServer, name: str) -> None:
    await api.kubelet.lose_node(name)
    api.kubelet.collect_garbage(name)


Trouble = Callable[[ApiServer, str], Awaitable[None]]
SUDDEN: dict[str, Trouble] = {
    "killed": lambda api, name: api.kubelet.kill(name),
    "memory": lambda api, name: api.kubelet.out_of_memory(name),
    "evicted": lambda api, name: api.kubelet.evict(name),
    "node": _cleared_away,
}
WITH_NOTICE: dict[str, Trouble] = {
    "preempted": _preempted,
    "drained": _drained,
    "": lambda api, name: api.kubelet.shut_down_node(name),  # the kubelet says why only when it is over
}


@pytest.mark.parametrize("words", SUDDEN)
async def test_why_a_session_was_lost_is_told(cluster: Cluster, alice: User, words: str) -> None:
    """In plain words, with the command that ran settled as lost and what it printed kept."""
    session = await alice.ready()
    command = await alice.execute(session, "echo before; sleep 600")
    await alice.until_output(session, b"before\r\n")
    await SUDDEN[words](cluster.api, cluster.pod())
    status = await alice.until(session, lambda status: status["state"] == "lost")
    assert words in status["reason"], status["reason"]
    record = await alice.ended(session, command)
    assert (record["state"], record["exitCode"]) == ("lost", None)
    output = await alice.transcript(session)
    assert b"before\r\n" in bytes(output.data)


@pytest.mark.parametrize("words", WITH_NOTICE, ids=["preempted", "drained", "shut-down"])
async def test_a_sandbox_taken_away_with_notice_ends_its_session_in_good_order(
    cluster: Cluster, alice: User, words: str
) -> None:
    """The transcript is whole to the last byte, and the reason is the cluster's, not a signal's number."""
    session = await alice.ready()
    command = await alice.execute(session, "echo before; sleep 600")
    await alice.until_output(session, b"before\r\n")
    await WITH_NOTICE[words](cluster.api, cluster.pod())
    output = await alice.transcript(session)
    assert output.end is not None
    assert (output.end["finalOffset"], output.gaps) == (output.offset, [])
    status = await alice.status(session)
    assert status["state"] == "closed"
    assert words in status["reason"], status["reason"]
    assert (await alice.ended(session, command))["state"] == "killed"


async def test_a_pod_deleted_with_its_whole_grace_does_not_take_it(cluster: Cluster, alice: User) -> None:
    """The session ends when its last word is recorded: nobody has to wait for the agent to give up."""
    session = await alice.ready()
    command = await alice.execute(session, "echo before; sleep 600")
    await alice.until_output(session, b"before\r\n")
    async with client(cluster.api) as kube:
        await kube.call("DELETE", f"{POD_PATH}/{cluster.pod()}")
        async with asyncio.timeout(GRACE_SECONDS / 2):
            output = await alice.transcript(session)
    assert (output.end, output.gaps) == ({"finalOffset": output.offset}, [])
    status = await alice.status(session)
    assert (status["state"], status["reason"]) == ("closed", "The session is closed. It was deleted.")
    record = await alice.ended(session, command)
    assert (record["state"], record["exitCode"]) == ("killed", None)


async def test_a_shell_that_its_user_hangs_up_says_so_at_once(alice: User) -> None:
    """Its sandbox ends by itself as soon as it may, and then it is known that nobody took it away."""
    session = await alice.ready()
    await alice.execute(session, "kill -HUP $$")
    async with asyncio.timeout(CAUSE_SECONDS / 2):
        await alice.transcript(session)
    assert (await alice.status(session))["reason"] == "The session is closed. The shell was killed by signal 1."


async def test_a_shell_that_its_user_kills_says_so(alice: User) -> None:
    """What nobody else did is not told as if somebody had."""
    session = await alice.ready()
    await alice.execute(session, "kill -9 $$")
    await alice.transcript(session)
    assert (await alice.status(session))["reason"] == "The session is closed. The shell was killed by signal 9."


@pytest.mark.slow
async def test_a_full_quota_is_a_queue(cluster: Cluster, alice: User) -> None:
    """The second session waits with its position, and starts by itself when there is room."""
    cluster.api.put_quota("sessions", {"pods": "1"})
    first = await alice.ready()
    second = await alice.create()
    waiting = await alice.until(second, lambda status: status["state"] == "queued" and status["position"] is not None)
    assert waiting["position"] == 1
    command = await alice.execute(second, "echo at last")
    await alice.call("DELETE", f"cleanup-session/{first}")
    record = await alice.ended(second, command)
    assert await alice.read(second, record["startOffset"], record["endOffset"]) == b"at last\r\n"
    assert len(cluster.api.etcd.all("pods")) == 1


async def test_a_session_waits_for_a_node(cluster: Cluster, alice: User) -> None:
    """No room on the nodes is no error; when there is some, it starts."""
    held = cluster.api.faults.hold_pods("unschedulable")
    session = await alice.create()
    await alice.until(session, lambda status: status["state"] == "starting")
    held.lift()
    await alice.until(session, lambda status: status["state"] == "ready")


async def test_an_image_that_is_not_there_fails_the_session(cluster: Cluster, alice: User) -> None:
    """At once, and with the cause."""
    cluster.api.faults.hold_pods("image")
    session = await alice.create()
    status = await alice.until(session, lambda status: status["state"] == "failed")
    assert "image cannot be pulled" in status["reason"]

    async def removed() -> bool:
        return not cluster.api.etcd.all("pods")

    await until(removed, "its pod is removed")


async def test_a_session_closed_while_its_pod_waits_leaves_nothing(cluster: Cluster, alice: User) -> None:
    """Whatever the pod waits for."""
    cluster.api.faults.hold_pods("slow")
    session = await alice.create()
    await alice.until(session, lambda status: status["state"] == "starting")
    await alice.call("DELETE", f"cleanup-session/{session}")
    await alice.until(session, lambda status: status["state"] == "closed")

    async def removed() -> bool:
        return not cluster.api.etcd.all("pods")

    await until(removed, "its pod is removed")


async def test_a_token_that_is_replaced_is_asked_for_again(cluster: Cluster, tmp_path: Path) -> None:
    """Tokens of workers expire; sessions do not notice."""
    issued = tmp_path / "credential.json"
    _issue(issued, "worker-token")
    config = json.loads(cluster.config.read_text())
    plugin = {
        "apiVersion": CREDENTIAL["apiVersion"],
        "command": "cat",
        "args": [str(issued)],
        "interactiveMode": "Never",
    }
    config["users"][0]["user"] = {"exec": plugin}
    cluster.config.write_text(json.dumps(config))
    stack, _ = await cluster.start()
    async with stack.user("alice") as alice:
        session = await alice.ready()
        _issue(issued, "next-token")
        cluster.api.accounts = {"next-token": WORKER}
        other = await alice.ready()
        for each in (session, other):
            assert (await alice.run(each, "echo here"))[1] == b"here\r\n"


def _issue(path: Path, token: str) -> None:
    """Have the credential plugin say this token from now on; it has to be asked every time."""
    path.write_text(
        json.dumps({**CREDENTIAL, "status": {"token": token, "expirationTimestamp": "2020-01-01T00:00:00Z"}})
    )


@pytest.mark.slow
async def test_a_worker_that_is_killed_is_followed_by_another(cluster: Cluster) -> None:
    """The pod outlives it, its output is exact, and the command ran once."""
    stack, (_, worker) = await cluster.start("gateway,ticker", "worker")
    async with stack.user("alice") as alice:
        session = await alice.ready()
        command = await alice.execute(session, f"echo ran >> runs; seq 1 {LAST}; sleep 1")
        await alice.until_output(session, b"\r\n1000\r\n")
        await stack.kill(worker)
        await stack.start("worker")
        record = await alice.ended(session, command, patience=90.0)
        assert await alice.read(session, record["startOffset"], record["endOffset"]) == NUMBERS
        assert (await alice.run(session, "cat runs"))[1] == b"ran\r\n"


@pytest.mark.slow
async def test_a_worker_stops_while_the_cluster_is_away(cluster: Cluster) -> None:
    """A roll-out does not wait for an API server that does not answer."""
    stack, (_, worker) = await cluster.start("gateway,ticker", "worker")
    async with stack.user("alice") as alice:
        await alice.ready()
        away = cluster.api.faults.add(Fault(path=PODS, drop="before", times=1_000_000))
        waiting = await alice.create()
        await alice.until(waiting, lambda status: status["state"] != "requested")
        worker.terminate()
        await soon(worker.wait(), timeout=40.0)
        away.times = 0
