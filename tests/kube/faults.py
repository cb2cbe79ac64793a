"""What goes wrong, told beforehand: faults of requests, and of the pods' way to running."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Literal

from tests.kube.answers import Object, Refused


@dataclass(eq=False)
class Fault:
    """What happens to requests that match; "" matches any method, `path` is a part of path and query.

    The first `skip` of them are let through, then `times` are hit. With `status` the request is refused with that and
    not carried out. `drop` cuts the connection "before" the request is carried out or "after" it, its answer unsent.
    `delay` is waited first, in seconds. Of a watch or an exec, `cut` is after how many bytes of the answer's body (for
    an exec: of its output) the connection breaks, and `freeze` after how many it stands still, open.
    """

    method: str = ""
    path: str = ""
    times: int = 1
    skip: int = 0
    status: int = 0
    reason: str = ""
    message: str = "injected by a test"
    retry_after: int | None = None
    details: Object | None = None
    delay: float = 0.0
    drop: Literal["", "before", "after"] = ""
    cut: int | None = None
    freeze: int | None = None
    hits: int = 0

    def strikes(self, method: str, path: str) -> bool:
        """Whether this request is hit; counts it."""
        if self.method not in ("", method) or self.path not in path:
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.hits >= self.times:
            return False
        self.hits += 1
        return True

    def refusal(self) -> Refused:
        """The answer with `status`."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return Refused(self.status, self.message, reason=self.reason, details=self.details, headers=headers)


PodTrouble = Literal["unschedulable", "refused", "image", "slow"]


@dataclass(eq=False)
class PodFault:
    """What holds up a pod on its way to running, until it is lifted.

    "unschedulable": no node has room. "refused": its node's kubelet has none after all, which cannot be lifted.
    "image": its image cannot be pulled. "slow": its container is being created.
    """

    trouble: PodTrouble
    message: str
    times: int
    lifted: asyncio.Event = field(default_factory=asyncio.Event)

    def lift(self) -> None:
        """What was wrong is not any more; pods that were held go on."""
        self.times = 0
        self.lifted.set()


MESSAGES: dict[PodTrouble, str] = {
    "unschedulable": "0/3 nodes are available: 3 Insufficient memory. preemption: 0/3 nodes are available: "
    "3 No preemption victims found for incoming pod.",
    "refused": "Pod was rejected: Node didn't have enough resource: memory, requested: 536870912, used: 1, capacity: 2",
    "image": "manifest unknown",
    "slow": "",
}


class Faults:
    """The faults of one API server; every one that a test adds is used up or lifted by itself."""

    def __init__(self) -> None:
        self._requests: list[Fault] = []
        self._pods: list[PodFault] = []

    def add(self, fault: Fault) -> Fault:
        """Have requests go wrong."""
        self._requests.append(fault)
        return fault

    def hold_pods(self, trouble: PodTrouble, *, times: int = 1, message: str = "") -> PodFault:
        """Have the next `times` pods get stuck on their way."""
        self._pods.append(PodFault(trouble, message or MESSAGES[trouble], times))
        return self._pods[-1]

    def for_request(self, method: str, path: str) -> Fault | None:
        """The fault that hits this request."""
        return next((fault for fault in self._requests if fault.strikes(method, path)), None)

    def for_pod(self, trouble: PodTrouble) -> PodFault | None:
        """The fault that holds up a new pod in this way."""
        for fault in self._pods:
            if fault.trouble == trouble and fault.times > 0:
                fault.times -= 1
                return fault
        return None
