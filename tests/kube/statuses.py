"""A pod's status at each station of its life, as scheduler, kubelet and controllers write it.

Every function changes the pod in place.
"""

from __future__ import annotations

from typing import Any

from tests.kube.answers import Object, timestamp

NODE, NODE_ADDRESS, POD_ADDRESS = "node-1", "10.0.0.1", "10.1.0.7"
KILLED = 137


def condition(pod: Object, kind: str, status: str, reason: str = "", message: str = "") -> None:
    """Set a condition; its time of transition changes only with its status."""
    conditions = pod["status"].setdefault("conditions", [])
    found = next((each for each in conditions if each["type"] == kind), None)
    if found is None:
        conditions.append(found := {"type": kind, "status": "", "lastProbeTime": None})
    if found["status"] != status:
        found.update(status=status, lastTransitionTime=timestamp())
    for key, value in (("reason", reason), ("message", message)):
        found.pop(key, None)
        if value:
            found[key] = value


def pending(pod: Object) -> None:
    """As the API server makes it."""
    pod["status"] = {"phase": "Pending", "qosClass": "Burstable"}


def unschedulable(pod: Object, message: str) -> None:
    """The scheduler found no node."""
    condition(pod, "PodScheduled", "False", "Unschedulable", message)


def scheduled(pod: Object) -> None:
    """The scheduler bound it to a node."""
    pod["spec"]["nodeName"] = NODE
    condition(pod, "PodScheduled", "True")


def waiting(pod: Object, reason: str = "ContainerCreating", message: str = "") -> None:
    """The kubelet has it and its containers wait."""
    pod["status"].setdefault("startTime", timestamp())
    pod["status"].update(hostIP=NODE_ADDRESS, hostIPs=[{"ip": NODE_ADDRESS}])
    condition(pod, "PodReadyToStartContainers", "True" if reason != "ContainerCreating" else "False")
    condition(pod, "Initialized", "True")
    _not_ready(pod, "ContainersNotReady")
    _containers(pod, {"waiting": {"reason": reason, **({"message": message} if message else {})}})


def running(pod: Object, *, ready: bool) -> None:
    """Its containers run; `ready` once their probes say so."""
    status = pod["status"]
    status.update(phase="Running", podIP=POD_ADDRESS, podIPs=[{"ip": POD_ADDRESS}])
    condition(pod, "PodReadyToStartContainers", "True")
    started = next(
        (each["state"]["running"] for each in status["containerStatuses"] if "running" in each["state"]),
        {"startedAt": timestamp()},
    )
    _containers(pod, {"running": started}, ready=ready)
    if ready:
        condition(pod, "Ready", "True")
        condition(pod, "ContainersReady", "True")


def terminated(pod: Object, code: int, reason: str = "", message: str = "") -> None:
    """Its containers ended with this exit code; the reason follows from it where none is given."""
    status = pod["status"]
    status["phase"] = "Failed" if code else "Succeeded"
    _not_ready(pod, "PodFailed" if code else "PodCompleted")
    _containers(pod, {"terminated": ended_container(code, reason, message)})


def ended_container(code: int, reason: str = "", message: str = "") -> Object:
    """The state of a container that has ended."""
    state: Object = {
        "exitCode": code,
        "reason": reason or ("Error" if code else "Completed"),
        "startedAt": timestamp(),
        "finishedAt": timestamp(),
        "containerID": "containerd://ended",
    }
    return {**state, **({"message": message} if message else {})}


def failed(pod: Object, reason: str, message: str) -> None:
    """The kubelet gave the whole pod up: Evicted, DeadlineExceeded, Terminated (a node that shuts down)."""
    status = pod["status"]
    status.update(phase="Failed", reason=reason, message=message)
    if any("running" in each["state"] for each in status.get("containerStatuses", [])):
        _containers(pod, {"terminated": ended_container(KILLED)})
    _not_ready(pod, "PodFailed")


def disrupted(pod: Object, reason: str, message: str) -> None:
    """Something other than the pod itself is about to end it."""
    condition(pod, "DisruptionTarget", "True", reason, message)


def node_not_ready(pod: Object) -> None:
    """The node stopped to report."""
    condition(pod, "Ready", "False", "NodeNotReady", "Node is not ready")


def _not_ready(pod: Object, reason: str) -> None:
    for kind in ("Ready", "ContainersReady"):
        condition(pod, kind, "False", reason)


def _containers(pod: Object, state: dict[str, Any], *, ready: bool = False) -> None:
    pod["status"]["containerStatuses"] = [
        {
            "name": container["name"],
            "image": container["image"],
            "imageID": "",
            "ready": ready,
            "started": "running" in state,
            "restartCount": 0,
            "lastState": {},
            "state": state,
        }
        for container in pod["spec"]["containers"]
    ]
