"""Bad days of a cluster, seen through the port: what is said of a pod's end, and what a worker rides out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from infra.adapters import kube, kube_api
from infra.adapters.kube import KubeSandboxes, kube_sandboxes
from infra.adapters.kube_settings import KubeSettings
from schemas.errors import AgentUnreachable, NoCapacity, SandboxFailed, SandboxGone, Unavailable
from schemas.ports import Phase
from tests.contracts.sandboxes_contract import greeting, spec, started
from tests.contracts.waiting import soon
from tests.kube.faults import Fault
from tests.kube.pods import RESTRICTED
from tests.kube.rights import Account
from tests.kube.server import NAMESPACE, ApiServer

PODS = f"/namespaces/{NAMESPACE}/pods"


@pytest.fixture
async def sandboxes(settings: KubeSettings) -> AsyncIterator[KubeSandboxes]:
    """A worker's view of the cluster; its pods end with the server."""
    async with kube_sandboxes(settings) as found:
        yield found


def posts(api: ApiServer) -> int:
    """How many creates the server was asked for."""
    return sum(method == "POST" for method, _ in api.requests)


async def removed(sandboxes: KubeSandboxes) -> None:
    """Return once the cluster has no pod any more."""
    while await sandboxes.list():  # noqa: ASYNC110 - only the cluster knows
        await asyncio.sleep(0.01)


# Creating


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", PODS, status=429, retry_after=1),
        Fault("POST", PODS, status=500),
        Fault("POST", PODS, status=503, times=2),
        Fault("POST", PODS, drop="before"),
        Fault("POST", PODS, status=409, reason="Conflict", message="Operation cannot be fulfilled on resourcequotas"),
        Fault("GET", f"{PODS}/one", drop="after"),
    ],
    ids=["429", "500", "503-twice", "cut", "quota-conflict", "none"],
)
async def test_a_create_outlives_a_bad_answer(api: ApiServer, sandboxes: KubeSandboxes, fault: Fault) -> None:
    """A session's start does not fail because one request did."""
    api.faults.add(fault)
    made = await soon(sandboxes.create(spec("one", "s-one")))
    assert [each.uid for each in await sandboxes.list()] == [made.uid]


async def test_a_create_whose_answer_was_lost_is_found(api: ApiServer, sandboxes: KubeSandboxes) -> None:
    """It was carried out: the second try finds its own pod, and there is one."""
    api.faults.add(Fault("POST", PODS, drop="after"))
    made = await soon(sandboxes.create(spec("one", "s-one")))
    assert posts(api) == 2
    assert [each.uid for each in await sandboxes.list()] == [made.uid]


async def test_a_server_that_stays_away_is_unavailable(
    api: ApiServer, sandboxes: KubeSandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a while the session goes back to the queue instead of waiting in a worker."""
    monkeypatch.setattr(kube_api, "CALL_SECONDS", 0.5)
    api.faults.add(Fault("POST", PODS, status=503, times=1_000))
    with pytest.raises(Unavailable) as raised:
        await soon(sandboxes.create(spec("one", "s-one")))
    assert not isinstance(raised.value, NoCapacity)
    api.faults.add(Fault("GET", PODS, status=429, retry_after=3_600))
    with pytest.raises(Unavailable):
        await soon(sandboxes.list())


async def test_a_quota_is_a_full_runtime(api: ApiServer, sandboxes: KubeSandboxes) -> None:
    """Over quota is a place in the queue; what a quota cannot count is a defect of the deployment."""
    api.put_quota("all", {"pods": "0"})
    with pytest.raises(NoCapacity, match="exceeded quota"):
        await sandboxes.create(spec("one", "s-one"))
    api.put_quota("all", {"requests.example.com/gpu": "1", "pods": "5"})
    with pytest.raises(SandboxFailed, match="must specify"):
        await sandboxes.create(spec("one", "s-one"))


async def test_a_quota_that_our_own_pod_fills_is_no_lack_of_room(api: ApiServer, sandboxes: KubeSandboxes) -> None:
    """A real server asks the quota before it looks at the name: a redelivered event still finds its pod."""
    api.put_quota("all", {"pods": "1"})
    first = await sandboxes.create(spec("one", "s-one"))
    assert (await sandboxes.create(spec("one", "s-one"))).uid == first.uid
    with pytest.raises(SandboxFailed, match="another session"):
        await sandboxes.create(spec("one", "s-two"))


async def test_an_account_without_rights_is_told_apart(api: ApiServer, sandboxes: KubeSandboxes) -> None:
    """A missing right is mended by people: sessions wait for that, and none of them fails."""
    api.accounts["worker-token"] = Account("nobody", frozenset())
    with pytest.raises(Unavailable, match="cannot create"):
        await sandboxes.create(spec("one", "s-one"))


async def test_a_warm_pod_gives_way_to_a_session(api: ApiServer, sandboxes: KubeSandboxes) -> None:
    """The pool never starves users, and one warm pod is enough for one session."""
    api.put_quota("all", {"pods": "2"})
    for name in ("w1", "w2"):
        await started(sandboxes, name)
    made = await soon(sandboxes.create(spec("one", "s-one")))
    left = await sandboxes.list()
    assert len(left) == 2
    assert made.uid in {each.uid for each in left}
    with pytest.raises(NoCapacity):
        await sandboxes.create(spec("w3"))


async def test_a_pod_of_the_same_name_on_its_way_out_is_waited_for(
    api: ApiServer, sandboxes: KubeSandboxes, settings: KubeSettings
) -> None:
    """A session is not given what is being deleted."""
    old = await started(sandboxes, "one", "s-one")
    deleting = asyncio.create_task(sandboxes.delete("one", old.uid))
    async with kube_sandboxes(settings) as peer:
        new = await soon(peer.create(spec("one", "s-one")))
        await soon(deleting)
        assert new.uid != old.uid
        assert (await soon(peer.running("one", new.uid))).uid == new.uid


# Coming to run


async def test_an_image_that_is_not_there_fails_its_session(api: ApiServer, sandboxes: KubeSandboxes) -> None:
    """At once, and by name; not after the start time-out."""
    api.faults.hold_pods("image")
    made = await sandboxes.create(spec("one", "s-one"))
    with pytest.raises(SandboxFailed, match="image cannot be pulled"):
        await soon(sandboxes.running("one", made.uid))


async def test_a_pod_without_a_node_is_a_full_runtime(api: ApiServer, settings: KubeSettings) -> None:
    """After the patience of the deployment; a node that comes before that is in time."""
    fault = api.faults.hold_pods("unschedulable")
    async with kube_sandboxes(settings.model_copy(update={"unschedulable_seconds": 1.5})) as hasty:
        made = await hasty.create(spec("one", "s-one"))
        with pytest.raises(NoCapacity, match="no node has room"):
            await soon(hasty.running("one", made.uid))
    async with kube_sandboxes(settings) as patient:
        waiting = asyncio.create_task(patient.running("one", made.uid))
        found = await patient.get("one")
        assert found is not None
        assert (found.phase, "no node has room" in found.reason) == (Phase.STARTING, True)
        fault.lift()
        assert (await soon(waiting)).phase is Phase.RUNNING


async def test_a_warm_pod_gives_its_place_on_a_node(api: ApiServer, sandboxes: KubeSandboxes) -> None:
    """The scheduler displaces nothing of the same value: a session that finds no node is helped."""
    warm = await started(sandboxes, "warm")
    fault = api.faults.hold_pods("unschedulable")
    made = await sandboxes.create(spec("one", "s-one"))
    waiting = asyncio.create_task(sandboxes.running("one", made.uid))
    assert (await soon(sandboxes.gone("warm", warm.uid))).phase is Phase.ENDED
    fault.lift()
    assert (await soon(waiting)).phase is Phase.RUNNING


async def test_a_slow_start_is_waited_for(api: ApiServer, sandboxes: KubeSandboxes) -> None:
    """A new node takes minutes."""
    fault = api.faults.hold_pods("slow")
    made = await sandboxes.create(spec("one", "s-one"))
    waiting = asyncio.create_task(sandboxes.running("one", made.uid))
    with pytest.raises(AgentUnreachable, match="does not run yet"):
        await sandboxes.connect("one", made.uid)
    fault.lift()
    assert (await soon(waiting)).phase is Phase.RUNNING


# Ending


Trouble = Callable[[ApiServer], Awaitable[None]]


async def _preempt(api: ApiServer) -> None:
    api.kubelet.preempt("one")


async def _collect(api: ApiServer) -> None:
    await api.kubelet.lose_node("one")
    api.kubelet.collect_garbage("one")


TROUBLES: dict[str, Trouble] = {
    "killed from outside": lambda api: api.kubelet.kill("one"),
    "ran out of memory": lambda api: api.kubelet.out_of_memory("one"),
    "evicted from its node: The node was low on resource": lambda api: api.kubelet.evict("one"),
    "its node was shut down": lambda api: api.kubelet.shut_down_node("one"),
    "its node failed": lambda api: api.kubelet.lose_node("one"),
    "preempted": _preempt,
}


@pytest.mark.parametrize("words", TROUBLES)
async def test_every_end_is_told(api: ApiServer, sandboxes: KubeSandboxes, words: str) -> None:
    """Whoever waits for a sandbox is told why it ended, and its connections end with it."""
    made = await started(sandboxes, "one", "s-one")
    stream = await sandboxes.connect("one", made.uid)
    waiting = asyncio.create_task(sandboxes.gone("one", made.uid))
    await TROUBLES[words](api)
    ended = await soon(waiting)
    assert (ended.phase, words in ended.reason) == (Phase.ENDED, True), ended.reason
    while await soon(stream.read(1_000)):
        pass
    with pytest.raises(SandboxGone, match=words):
        await soon(sandboxes.connect("one", made.uid))


async def test_what_the_cluster_took_is_remembered(api: ApiServer, sandboxes: KubeSandboxes) -> None:
    """Its object is gone with it: the tender that looks then still says why, and not that it vanished."""
    made = await started(sandboxes, "one", "s-one")
    waiting = asyncio.create_task(sandboxes.gone("one", made.uid))
    await _collect(api)
    ended = await soon(waiting)

    await soon(removed(sandboxes))
    found = await sandboxes.get("one")
    assert found is not None
    assert (found.uid, found.phase) == (made.uid, Phase.ENDED)
    assert "node" in found.reason
    assert "node" in ended.reason


async def test_a_dead_node_does_not_hold_up_a_delete_for_ever(
    api: ApiServer, sandboxes: KubeSandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That nothing runs any more cannot be promised: the sweep comes again."""
    made = await started(sandboxes, "one", "s-one")
    await api.kubelet.lose_node("one")
    monkeypatch.setattr(kube, "DELETE_SECONDS", 0.5)
    with pytest.raises(Unavailable, match="has not confirmed"):
        await soon(sandboxes.delete("one", made.uid))
    api.kubelet.collect_garbage("one")
    await soon(sandboxes.delete("one", made.uid))
    assert await sandboxes.list() == []


# The watch


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET", "watch=1", cut=0),
        Fault("GET", "watch=1", cut=700),
        Fault("GET", "watch=1", status=500),
        Fault("GET", "watch=1", status=410, reason="Expired"),
        Fault("GET", "watch=1", drop="before"),
        Fault("GET", "labelSelector", status=503),
    ],
    ids=["cut", "cut-in-an-event", "500", "410", "refused", "list"],
)
async def test_a_watch_that_breaks_is_taken_up_again(api: ApiServer, sandboxes: KubeSandboxes, fault: Fault) -> None:
    """Nobody who waits for a pod notices."""
    api.faults.add(fault)
    made = await started(sandboxes, "one", "s-one")
    waiting = asyncio.create_task(sandboxes.gone("one", made.uid))
    await api.kubelet.kill("one")
    assert "killed" in (await soon(waiting)).reason


async def test_a_watch_that_falls_silent_is_opened_anew(
    api: ApiServer, sandboxes: KubeSandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection may be dead without a word."""
    monkeypatch.setattr(kube_api, "WATCH_SILENCE_SECONDS", 0.5)
    fault = api.faults.add(Fault("GET", "watch=1", freeze=0))
    made = await started(sandboxes, "one", "s-one")
    assert fault.hits == 1
    await api.kubelet.kill("one")
    assert "killed" in (await soon(sandboxes.gone("one", made.uid))).reason


async def test_what_ends_while_nobody_looks_is_noticed(
    api: ApiServer, sandboxes: KubeSandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list after an expired watch lacks the pod: that is its end."""
    monkeypatch.setattr(kube_api, "WATCH_SECONDS", 1)
    made = await started(sandboxes, "one", "s-one")
    waiting = asyncio.create_task(sandboxes.gone("one", made.uid))
    away = api.faults.add(Fault("GET", "watch=1", status=503, times=1_000))
    while not away.hits:  # noqa: ASYNC110 - until the watch is over, and no other is let in
        await asyncio.sleep(0.01)
    await sandboxes._api.delete("one", made.uid, grace_seconds=0)
    api.compact()
    away.times = 0
    assert "deleted" in (await soon(waiting)).reason


# Connecting


@pytest.mark.parametrize("cut", [0, 1, 12, 13, 60])
async def test_a_stream_cut_at_any_byte_ends(api: ApiServer, sandboxes: KubeSandboxes, cut: int) -> None:
    """What came before the cut is given out, and a new connection is whole."""
    made = await started(sandboxes, "one", "s-one")
    whole = await greeting(sandboxes, made)
    api.faults.add(Fault("GET", "/exec", cut=cut))
    stream = await soon(sandboxes.connect("one", made.uid))
    read = b""
    while cut and (piece := await soon(stream.read(1_000))):
        read += piece
    assert whole.startswith(read[:13]) or not read
    assert len(read) == cut
    await stream.close()
    assert (await greeting(sandboxes, made))[:13] == whole[:13]


async def test_a_refused_exec_is_tried_again(api: ApiServer, sandboxes: KubeSandboxes) -> None:
    """An API server that restarts costs a moment."""
    made = await started(sandboxes, "one", "s-one")
    api.faults.add(Fault("GET", "/exec", status=500, times=2))
    assert await greeting(sandboxes, made)


async def test_no_connection_leads_into_a_later_pod_of_the_name(
    api: ApiServer, settings: KubeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exec goes by the name, and a worker whose watch is dead still takes the older one for alive."""
    monkeypatch.setattr(kube, "START_LOOK_SECONDS", 0.2)
    monkeypatch.setattr(kube, "LOOK_SECONDS", 0.2)
    api.faults.add(Fault("GET", "watch=1", freeze=0, times=1_000))
    async with kube_sandboxes(settings) as blind, kube_sandboxes(settings) as peer:
        old = await started(blind, "one", "s-one")
        await soon(peer.delete("one", old.uid))
        new = await started(peer, "one", "s-one")
        with pytest.raises(SandboxGone):
            await soon(blind.connect("one", old.uid))
        assert await greeting(blind, new)


async def test_a_server_that_refuses_every_exec_is_not_stormed(
    api: ApiServer, sandboxes: KubeSandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of sessions lose their connections at once when an API server restarts: it is given time."""
    monkeypatch.setattr(kube, "AGENT_SECONDS", 3.0)
    made = await started(sandboxes, "one", "s-one")
    refused = api.faults.add(Fault("GET", "/exec", status=429, times=1_000))
    with pytest.raises(AgentUnreachable):
        await soon(sandboxes.connect("one", made.uid))
    assert refused.hits <= 10


async def test_a_frozen_exec_is_given_up(
    api: ApiServer, sandboxes: KubeSandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accepted, and then not a byte: another connection may do better."""
    monkeypatch.setattr(kube, "GREETING_SECONDS", 0.3)
    made = await started(sandboxes, "one", "s-one")
    api.faults.add(Fault("GET", "/exec", freeze=0))
    assert await greeting(sandboxes, made)
    monkeypatch.setattr(kube, "AGENT_SECONDS", 0.5)
    api.faults.add(Fault("GET", "/exec", freeze=0, times=100))
    with pytest.raises(AgentUnreachable):
        await soon(sandboxes.connect("one", made.uid))


async def test_a_stream_that_outlives_its_pod_is_cut(
    api: ApiServer, sandboxes: KubeSandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Execs can freeze when their pod goes; the watch knows better."""
    monkeypatch.setattr(kube, "LAST_WORDS_SECONDS", 0.1)
    made = await started(sandboxes, "one", "s-one")
    api.faults.add(Fault("GET", "/exec", freeze=5))
    stream = await soon(sandboxes.connect("one", made.uid))
    assert len(await soon(stream.read(100))) == 5
    reading = asyncio.create_task(stream.read(100))
    await api.kubelet.kill("one")
    assert await soon(reading) == b""


# A deployment's start


async def test_the_cluster_is_asked_what_it_would_take(api: ApiServer, sandboxes: KubeSandboxes) -> None:
    """Whether its namespace enforces anything is said at a worker's start, and nothing is created."""
    assert "does not enforce" in await sandboxes.check_isolation()
    namespace = ("namespaces", "", NAMESPACE)
    found = api.etcd.get(namespace)
    assert found is not None
    found["metadata"]["labels"] = {RESTRICTED: "restricted"}
    api.etcd.put(namespace, found)
    assert "takes no others" in await sandboxes.check_isolation()
    api.put_quota("all", {"pods": "0"})
    assert await sandboxes.check_isolation()
    api.put_quota("all", {"requests.example.com/gpu": "1"})
    with pytest.raises(SandboxFailed, match="must specify"):
        await sandboxes.check_isolation()
    assert await sandboxes.list() == []


async def test_warm_pods_of_another_image_are_outdated(sandboxes: KubeSandboxes, settings: KubeSettings) -> None:
    """After a deployment nobody is given yesterday's image, and sessions that run keep theirs."""
    warm, own = await sandboxes.create(spec("warm")), await sandboxes.create(spec("one", "s-one"))
    assert not warm.outdated
    async with kube_sandboxes(settings.model_copy(update={"image": "pigeon/python-terminal:next"})) as newer:
        assert {each.name: each.outdated for each in await newer.list()} == {"warm": True, own.name: False}
