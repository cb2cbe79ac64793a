"""What a pod's status means, case by case as kubelets and controllers write them."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import Any

import pytest

from infra.adapters.kube_status import judge, read
from schemas.ports import Phase

Case = tuple[dict[str, Any], str]

STARTED = {"running": {"startedAt": "2026-11-23T01:00:02Z"}}
SCHEDULED = {"type": "PodScheduled", "status": "True"}


def raw(status: dict[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    """A pod with this status."""
    return {
        "metadata": {
            "name": "session-one",
            "uid": "u1",
            "resourceVersion": "17",
            "creationTimestamp": "2026-11-23T01:00:00Z",
            "labels": {"pigeon/session": "s-one", "pigeon/image": "0a", "pigeon/agent": "0b"},
            **metadata,
        },
        "status": status if status is not None else {"phase": "Pending"},
    }


def state(phase: str, container: dict[str, Any], **status: Any) -> dict[str, Any]:
    """A status with the state of the one container."""
    return {"phase": phase, "containerStatuses": [{"name": "sandbox", "state": container}], **status}


def exited(code: int, reason: str = "Error", message: str = "") -> dict[str, Any]:
    """A container that has ended."""
    return {"terminated": {"exitCode": code, "reason": reason, "message": message}}


def waits(reason: str, message: str = "") -> dict[str, Any]:
    """A container that is not started."""
    return state("Pending", {"waiting": {"reason": reason, "message": message}}, conditions=[SCHEDULED])


def disruption(reason: str) -> list[dict[str, Any]]:
    """The condition with which the cluster says why it ends a pod."""
    return [{"type": "DisruptionTarget", "status": "True", "reason": reason, "message": "…"}]


STARTING: list[Case] = [
    ({}, "waits for a node"),
    ({"phase": "Pending"}, "waits for a node"),
    ({"phase": "Pending", "conditions": [SCHEDULED]}, "preparing"),
    (waits("ContainerCreating"), "preparing"),
    (waits("ErrImagePull", "dial tcp: i/o timeout"), "image cannot be pulled: dial tcp"),
    (waits("ErrImagePull", "x@sha256:4030404: lookup registry.example: no such host"), "image cannot be pulled"),
    (waits("CreateContainerError", "context deadline exceeded"), "could not be created"),
    (waits("CreateContainerError", 'failed to reserve container name "a": name "a" is reserved'), "could not be"),
]


@pytest.mark.parametrize(("status", "words"), STARTING)
def test_a_pod_on_its_way_says_what_it_waits_for(status: dict[str, Any], words: str) -> None:
    """A person who waits is told for what."""
    verdict = judge(raw(status))
    assert (verdict.phase, verdict.hopeless) == (Phase.STARTING, False)
    assert words in verdict.reason


HOPELESS: list[Case] = [
    (waits("ErrImagePull", 'failed to resolve reference "x": x: not found'), "image cannot be pulled"),
    (waits("ImagePullBackOff", 'Back-off pulling image "x": ErrImagePull: … 403 Forbidden'), "image cannot be pulled"),
    (waits("ImagePullBackOff", "pull access denied, repository does not exist"), "image cannot be pulled"),
    (waits("InvalidImageName", 'couldn\'t parse image reference "X"'), "name is not valid"),
    (waits("ErrImageNeverPull"), "not on the node"),
    (waits("CreateContainerConfigError", 'configmap "pigeon-agent" not found'), 'configmap "pigeon-agent" not found'),
    (waits("RunContainerError", 'exec: "python3": executable file not found in $PATH'), "python3"),
    (state("Failed", exited(128, "StartError", 'exec: "python3": not found')), "could not be started"),
]


@pytest.mark.parametrize(("status", "words"), HOPELESS)
def test_what_cannot_come_to_run_is_not_waited_for(status: dict[str, Any], words: str) -> None:
    """A bad image fails its session at once, in words that name it."""
    verdict = judge(raw(status))
    assert verdict.hopeless
    assert words in verdict.reason


def test_a_pod_without_a_node_says_since_when() -> None:
    """How long a full cluster is waited for is the adapter's to decide."""
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes are available: 3 Insufficient cpu.",
        "lastTransitionTime": "2026-11-23T01:00:05Z",
    }
    verdict = judge(raw({"phase": "Pending", "conditions": [condition]}))
    assert verdict.phase is Phase.STARTING
    assert verdict.crowded_since == datetime(2026, 11, 23, 1, 0, 5, tzinfo=UTC)
    assert "no node has room for it: 0/3 nodes are available" in verdict.reason


def test_a_pod_that_its_node_did_not_take_found_no_room() -> None:
    """The scheduler and a kubelet may disagree; the session waits for another node."""
    for reason in ("OutOfcpu", "OutOfmemory", "OutOfpods", "UnexpectedAdmissionError"):
        verdict = judge(raw({"phase": "Failed", "reason": reason, "message": "Node didn't have enough resource"}))
        assert verdict.phase is Phase.ENDED
        assert verdict.crowded_since is not None


ENDED: list[Case] = [
    (state("Failed", exited(137, "OOMKilled")), "ran out of memory"),
    (state("Failed", exited(0, "OOMKilled")), "its agent ended with exit code 0"),
    (state("Failed", exited(137)), "killed from outside (signal 9)"),
    (state("Running", exited(143)), "killed from outside (signal 15)"),
    (state("Failed", exited(137, "ContainerStatusUnknown")), "killed from outside"),
    (state("Failed", exited(1, "Error", "Traceback\nZeroDivisionError")), "exit code 1: Traceback ZeroDivisionError"),
    (state("Succeeded", exited(0, "Completed")), "its agent ended with exit code 0"),
    (state("Failed", exited(137), reason="DeadlineExceeded", message="Pod was active on the node longer"), "lifetime"),
    (
        state(
            "Failed", exited(137), reason="Evicted", message='Usage of EmptyDir volume "workspace" exceeds the limit'
        ),
        'evicted from its node: Usage of EmptyDir volume "workspace" exceeds',
    ),
    ({"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory. "}, "low on resource"),
    ({"phase": "Failed", "reason": "Terminated", "message": "imminent node shutdown."}, "node was shut down"),
    ({"phase": "Failed", "reason": "NodeLost"}, "does not answer"),
    (state("Failed", exited(143), conditions=disruption("PreemptionByScheduler")), "preempted"),
    ({"phase": "Failed", "conditions": disruption("DeletionByPodGC")}, "node is gone"),
    ({"phase": "Failed", "message": "something new"}, "it ended: something new"),
    ({"phase": "Failed"}, "it ended"),
]


@pytest.mark.parametrize(("status", "words"), ENDED)
def test_every_end_is_told_in_plain_words(status: dict[str, Any], words: str) -> None:
    """Sandboxes that vanish unexplained are what people complain of most."""
    verdict = judge(raw(status))
    assert verdict.phase is Phase.ENDED
    assert not verdict.hopeless
    assert words in verdict.reason


def test_a_running_container_is_a_running_sandbox() -> None:
    """Its agent is its first process."""
    assert judge(raw(state("Running", STARTED))) == judge(raw(state("Running", STARTED, conditions=[SCHEDULED])))
    assert judge(raw(state("Running", STARTED))).phase is Phase.RUNNING


def test_only_our_own_container_counts() -> None:
    """A mesh or a policy may put one of its own beside it, and kubelets tell of them by name."""
    added = {"name": "proxy", "state": STARTED}
    creating = {"name": "sandbox", "state": {"waiting": {"reason": "ContainerCreating"}}}
    status = {"phase": "Pending", "conditions": [SCHEDULED], "containerStatuses": [added, creating]}
    assert judge(raw(status)).phase is Phase.STARTING
    over = {"name": "sandbox", "state": exited(137)}
    ended = judge(raw({"phase": "Running", "containerStatuses": [added, over]}))
    assert (ended.phase, ended.reason) == (Phase.ENDED, "it was killed from outside (signal 9)")


def test_a_pod_that_is_being_ended_serves_to_the_last() -> None:
    """Within its grace its agent still gives out what was printed; when the container is over, so is the sandbox."""
    leaving = {"deletionTimestamp": "2026-11-23T02:00:00Z"}
    drained = judge(raw(state("Running", STARTED, conditions=disruption("EvictionByEvictionAPI")), **leaving))
    assert drained.phase is Phase.RUNNING
    assert "drained" in drained.reason
    over = judge(raw(state("Running", exited(137)), **leaving))
    assert (over.phase, over.reason) == (Phase.ENDED, "it was deleted")
    assert judge(raw(waits("ContainerCreating"), **leaving)).phase is Phase.ENDED
    starved = judge(raw(state("Failed", exited(137, "OOMKilled")), **leaving))
    assert "memory" in starved.reason


def test_a_pod_on_a_dead_node_is_not_waited_for() -> None:
    """Its status says that it runs for as long as nobody can ask the node."""
    lost = state("Running", STARTED, conditions=disruption("DeletionByTaintManager"))
    verdict = judge(raw(lost, deletionTimestamp="2026-11-23T02:00:00Z"))
    assert verdict.phase is Phase.ENDED
    assert "node" in verdict.reason


def test_long_messages_are_cut() -> None:
    """A reason is a line on somebody's screen."""
    verdict = judge(raw(waits("ErrImagePull", "x" * 5_000)))
    assert len(verdict.reason) < 400


def test_reading_takes_what_we_keep() -> None:
    """A pod becomes a small value; what else it says is let go."""
    pod = read(raw(state("Running", STARTED)))
    assert (pod.name, pod.uid, pod.version, pod.session, pod.image, pod.agent) == (
        *("session-one", "u1", 17, "s-one"),
        *("0a", "0b"),
    )
    assert not pod.leaving
    assert pod.sandbox().created_at == datetime(2026, 11, 23, 1, tzinfo=UTC)


@pytest.mark.parametrize(("status", "_"), STARTING + HOPELESS + ENDED)
def test_reading_changes_nothing(status: dict[str, Any], _: str) -> None:
    """It is a pure function, also of what is half filled in."""
    given = raw(status)
    before = copy.deepcopy(given)
    assert read(given) == read(given)
    assert given == before


def test_what_a_pod_says_at_its_end_steers_no_terminal_and_fits_every_store() -> None:
    """A program in it may write the container's last words: escape sequences, and halves of characters."""
    verdict = judge(raw(state("Failed", exited(3, message="bye\x1b[2J\x07\ud800 \n\u202enow"))))
    assert verdict.reason == "its agent ended with exit code 3: bye\ufffd[2J\ufffd\ufffd \ufffdnow"
    verdict.reason.encode()
