"""What the API server says of a pod, as its phase and a reason in plain words. Nothing here talks to anybody."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from signal import SIGKILL
from typing import Any

from infra.adapters.kube_pod import AGENT_LABEL, CONTAINER, IMAGE_LABEL, SESSION_LABEL
from schemas.ports import Phase, Sandbox

SIGNALS = 128  # an exit code above this is the number of the signal that ended the process
LIFETIME = "its lifetime was over"
DELETED = "it was deleted"

# why a container cannot be started, where waiting does not help
HOPELESS = {
    "InvalidImageName": "its image's name is not valid",
    "ErrImageNeverPull": "its image is not on the node, and may not be pulled",
    "CreateContainerConfigError": "its container's configuration is not valid",
    "CreateContainerError": "its container could not be created",
    "RunContainerError": "its container could not be started",
    "StartError": "its container could not be started",
    "ContainerCannotRun": "its container could not be started",
}
PULLING = frozenset({"ErrImagePull", "ImagePullBackOff", "ImageInspectError", "RegistryUnavailable"})
NEVER_PULLED = (
    *("not found", "manifest unknown", "access denied", "is denied", "unauthorized", "no match for platform"),
    *("403 forbidden", "404 not found"),  # the bare numbers are in many a digest
)
BUSY = ("deadline exceeded", "reserve container name", "timeout", "timed out")  # a node under load, which tries again

# why the cluster itself ended a pod, by the reason of its condition DisruptionTarget
DISRUPTIONS = {
    "PreemptionByScheduler": "it was preempted: the cluster needed its place for more important work",
    "DeletionByTaintManager": "its node failed or was taken out of service",
    "EvictionByEvictionAPI": "it was evicted: its node is being drained",
    "DeletionByPodGC": "its node is gone",
    "TerminationByKubelet": "its node ended it, for lack of resources or to shut down",
}
# and by the reason of its status
ENDS = {
    "DeadlineExceeded": LIFETIME,
    "Evicted": "it was evicted from its node",
    "Preempting": DISRUPTIONS["PreemptionByScheduler"],
    "NodeLost": "its node does not answer any more",
    "Terminated": "its node was shut down",
    "Shutdown": "its node was shut down",
    "NodeShutdown": "its node was shut down",
}
# a node's kubelet refused a pod that the scheduler had sent it; another node may take it
REFUSED_BY_NODE = ("OutOf", "UnexpectedAdmissionError", "NodeAffinity", "NodePorts")


@dataclass(frozen=True, slots=True)
class Pod:
    """What we keep of a pod. `version` grows with every change of it.

    `hopeless`: it did not come to run, and another one would not either. `crowded_since`: since when no node has had
    room for it. `leaving`: its end was asked for. `disrupted`: by the cluster itself. `image` and
    `agent` tell which ones, as digests.
    """

    name: str
    uid: str
    version: int
    session: str | None
    created_at: datetime
    phase: Phase
    reason: str = ""
    hopeless: bool = False
    crowded_since: datetime | None = None
    leaving: bool = False
    disrupted: bool = False
    image: str = ""
    agent: str = ""

    def sandbox(self, *, image: str = "", agent: str = "") -> Sandbox:
        """As the port shows it, to a deployment with this image and agent (digests)."""
        outdated = self.session is None and bool(image) and (self.image, self.agent) != (image, agent)
        return Sandbox(self.name, self.uid, self.session, self.phase, self.created_at, self.reason, outdated)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far a pod is, and why."""

    phase: Phase
    reason: str = ""
    hopeless: bool = False
    crowded_since: datetime | None = None


def read(raw: Mapping[str, Any]) -> Pod:
    """A pod as the API server gives it. Raises KeyError or ValueError for what is no pod."""
    metadata = raw["metadata"]
    labels = metadata.get("labels") or {}
    verdict = judge(raw)
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        version=int(metadata["resourceVersion"]),
        session=labels.get(SESSION_LABEL),
        created_at=datetime.fromisoformat(metadata["creationTimestamp"]),
        phase=verdict.phase,
        reason=verdict.reason,
        hopeless=verdict.hopeless,
        crowded_since=verdict.crowded_since,
        leaving="deletionTimestamp" in metadata,
        disrupted=bool(_disruption(raw.get("status") or {})),
        image=labels.get(IMAGE_LABEL, ""),
        agent=labels.get(AGENT_LABEL, ""),
    )


def judge(raw: Mapping[str, Any]) -> Verdict:
    """How far the pod is. One that is being ended runs as long as its container: its agent serves what is left."""
    status = raw.get("status") or {}
    state = _state(status)
    leaving = "deletionTimestamp" in raw["metadata"]
    if status.get("phase") in ("Succeeded", "Failed"):
        return _ended(raw, status, state)
    if leaving and ("running" not in state or _reason(_disruption(status)) == "DeletionByTaintManager"):
        return Verdict(Phase.ENDED, why_deleted(raw))
    if "terminated" in state:  # its phase follows within moments
        return _ended(raw, status, state)
    if "running" in state:
        return Verdict(Phase.RUNNING, why_deleted(raw) if leaving else "")
    return _starting(status, state.get("waiting") or {})


def why_deleted(raw: Mapping[str, Any]) -> str:
    """Why a pod that is going, or gone, was deleted."""
    status = raw.get("status") or {}
    if status.get("phase") in ("Succeeded", "Failed"):
        return _ended(raw, status, _state(status)).reason
    return DISRUPTIONS.get(_reason(_disruption(status)), DELETED)


def _ended(raw: Mapping[str, Any], status: Mapping[str, Any], state: Mapping[str, Any]) -> Verdict:
    reason = str(status.get("reason") or "")
    said = _short(status.get("message"))
    if reason.startswith(REFUSED_BY_NODE):
        return Verdict(Phase.ENDED, _with("its node had no room for it", said), crowded_since=_time(raw["metadata"]))
    if reason == "DeadlineExceeded":
        return Verdict(Phase.ENDED, LIFETIME)
    if reason in ENDS:
        return Verdict(Phase.ENDED, _with(ENDS[reason], said))
    if words := DISRUPTIONS.get(_reason(_disruption(status))):
        return Verdict(Phase.ENDED, words)
    terminated = state.get("terminated")
    if terminated is None:
        return Verdict(Phase.ENDED, _with("it ended", said or reason))
    return _exited(terminated, leaving="deletionTimestamp" in raw["metadata"])


def _exited(terminated: Mapping[str, Any], *, leaving: bool) -> Verdict:
    reason, code = str(terminated.get("reason") or ""), int(terminated.get("exitCode") or 0)
    said = _short(terminated.get("message"))
    if reason == "OOMKilled" and code == SIGNALS + SIGKILL:  # else a program of it was, and the container lived on
        return Verdict(Phase.ENDED, "it ran out of memory: the kernel ended it")
    if reason in HOPELESS:
        return Verdict(Phase.ENDED, _with(HOPELESS[reason], said), hopeless=True)
    if leaving:
        return Verdict(Phase.ENDED, DELETED)
    if code > SIGNALS:
        return Verdict(Phase.ENDED, f"it was killed from outside (signal {code - SIGNALS})")
    return Verdict(Phase.ENDED, _with(f"its agent ended with exit code {code}", said if code else ""))


def _starting(status: Mapping[str, Any], waiting: Mapping[str, Any]) -> Verdict:
    reason, said = str(waiting.get("reason") or ""), _short(waiting.get("message"))
    if reason in HOPELESS:
        return Verdict(Phase.STARTING, _with(HOPELESS[reason], said), hopeless=not _says(said, BUSY))
    if reason in PULLING:
        never = _says(said, NEVER_PULLED) and not _says(said, BUSY)
        return Verdict(Phase.STARTING, _with("its image cannot be pulled", said), hopeless=never)
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False" and _reason(scheduled) == "Unschedulable":
        words = _with("no node has room for it", _short(scheduled.get("message")))
        return Verdict(Phase.STARTING, words, crowded_since=_time(scheduled))
    if scheduled.get("status") == "True":
        return Verdict(Phase.STARTING, "its node is preparing it")
    return Verdict(Phase.STARTING, "it waits for a node")


def _says(said: str, any_of: Sequence[str]) -> bool:
    return any(words in said.lower() for words in any_of)


def _state(status: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of our container, whatever others a cluster adds: running, waiting or terminated is its only key."""
    for container in status.get("containerStatuses") or ():
        if container.get("name") == CONTAINER:
            state: Mapping[str, Any] = container.get("state") or {}
            return state
    return {}


def _disruption(status: Mapping[str, Any]) -> Mapping[str, Any]:
    condition = _condition(status, "DisruptionTarget")
    return condition if condition.get("status") == "True" else {}


def _condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    conditions: Iterator[Mapping[str, Any]] = iter(status.get("conditions") or ())
    return next((condition for condition in conditions if condition.get("type") == kind), {})


def _reason(condition: Mapping[str, Any]) -> str:
    return str(condition.get("reason") or "")


def _time(thing: Mapping[str, Any]) -> datetime | None:
    text = thing.get("lastTransitionTime") or thing.get("creationTimestamp")
    return datetime.fromisoformat(text) if text else None


def _with(words: str, said: str) -> str:
    return f"{words}: {said}" if said else words


def _short(text: Any, limit: int = 300) -> str:
    """One line of what a component of the cluster said, or a program in the pod, which may want to steer whoever's
    terminal this is shown on, or to name characters that no store takes."""
    words = " ".join(str(text or "").split()).rstrip(".")
    line = "".join(character if character.isprintable() else "\ufffd" for character in words)
    return line if len(line) <= limit else f"{line[:limit]}…"
