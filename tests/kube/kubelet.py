"""A kubelet (and scheduler) whose containers are local sandboxes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from infra.local.sandbox_record import LIFETIME_OVER, OF, Record
from infra.local.sandboxes import LocalSandboxes
from schemas.errors import PigeonError, SandboxFailed, SandboxGone
from schemas.limits import Limits
from schemas.ports import ByteStream, Phase, Sandbox, SandboxSpec
from tests.kube import statuses
from tests.kube.answers import Object, timestamp
from tests.kube.etcd import Etcd, Key
from tests.kube.faults import Faults
from tests.kube.quantities import quantity

FOREVER = 10 * 365 * 24 * 3600  # seconds that a pod without a deadline may live
SIGNAL = re.compile(r"signal (\d+)")
LIMIT = re.compile(r"\b(NPROC|FSIZE)=(\d+)")  # what the agent is told to set
EXIT_CODE = re.compile(r"exit code (\d+)")
DEADLINE = "Pod was active on the node longer than the specified deadline"


class PodWorker:
    """The life of one pod, from scheduling to removal. Every status it writes goes through the store."""

    def __init__(self, kubelet: Kubelet, key: Key, pod: Object) -> None:
        self.pod = pod
        self.uid: str = pod["metadata"]["uid"]
        self.sandbox: Sandbox | None = None
        self.closed = asyncio.Event()  # nothing of it runs any more
        self.node_gone = False
        self._kubelet = kubelet
        self._key = key
        self._making: asyncio.Task[Sandbox] | None = None
        self._life = kubelet.spawn(self._live())
        self._end: asyncio.Task[None] | None = None

    def write(self, change: Callable[..., None], *args: Any, **options: Any) -> None:
        """Change the pod in the store, if it is still there."""
        self._kubelet.etcd.change(self._key, self.uid, lambda pod: change(pod, *args, **options))

    def terminate(self, grace: float) -> None:
        """End it within the grace period, in seconds, and remove it.

        A second call with a shorter one changes nothing: a kubelet does not call off the stop of a container
        (kubernetes/kubernetes#113606).
        """
        if self._end is None or self._end.done():
            self._end = self._kubelet.spawn(self._terminate(grace))

    async def kill(self, send: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to its first process, behind everybody's back."""
        if self.sandbox is not None:
            await asyncio.to_thread(self._kubelet.signal, self.sandbox, send)

    async def fail(self, change: Callable[[Object], None], grace: float = 0.0) -> None:
        """Give the pod up with this status, as an eviction does: it stays in the API, nothing of it runs.

        Its agent is asked to end, and given the grace, in seconds, to do so.
        """
        await self._stop_life()
        await self._ask(grace)
        await self._remove_sandbox()
        self.write(change)

    async def _live(self) -> None:
        await self._schedule()
        if fault := self._kubelet.faults.for_pod("refused"):
            self.write(statuses.failed, "OutOfmemory", fault.message)
            return
        self.write(statuses.waiting)
        await self._mount()
        await self._pull()
        if await self._create():
            await self._run()

    async def _schedule(self) -> None:
        if fault := self._kubelet.faults.for_pod("unschedulable"):
            self.write(statuses.unschedulable, fault.message)
            await fault.lifted.wait()
        self.write(statuses.scheduled)

    async def _mount(self) -> None:
        """Like the real one, without a word in the status while a volume's ConfigMap is missing."""
        etcd, namespace = self._kubelet.etcd, self._key[1]
        for volume in self.pod["spec"].get("volumes") or []:
            source = volume.get("configMap") or {}
            while source and not source.get("optional") and not etcd.get(("configmaps", namespace, source["name"])):
                await etcd.news(etcd.revision)

    async def _pull(self) -> None:
        if fault := self._kubelet.faults.for_pod("image"):
            image = self.pod["spec"]["containers"][0]["image"]
            told = f'failed to pull and unpack image "{image}": {fault.message}'
            self.write(statuses.waiting, "ErrImagePull", told)
            self.write(statuses.waiting, "ImagePullBackOff", f'Back-off pulling image "{image}": ErrImagePull: {told}')
            await fault.lifted.wait()
        if fault := self._kubelet.faults.for_pod("slow"):
            await fault.lifted.wait()

    async def _create(self) -> bool:
        """Whether its container was started. A creation that is under way cannot be called off."""
        self._making = asyncio.create_task(self._kubelet.sandboxes.create(self._spec()))
        try:
            self.sandbox = await asyncio.shield(self._making)
        except PigeonError as error:
            self.write(statuses.terminated, 128, "StartError", str(error))
            return False
        probed = any("readinessProbe" in container for container in self.pod["spec"]["containers"])
        self.write(statuses.running, ready=not probed)
        return True

    async def _run(self) -> None:
        assert self.sandbox is not None
        name, uid = self.sandbox.name, self.sandbox.uid
        try:
            await self._kubelet.sandboxes.running(name, uid)
            self.write(statuses.running, ready=True)
        except (SandboxGone, SandboxFailed):
            pass  # what follows says why
        ended = await self._kubelet.sandboxes.gone(name, uid)
        self.write(_ended, ended.reason)
        await self._remove_sandbox()

    async def _terminate(self, grace: float) -> None:
        await self._ask(grace)
        await self._stop_life()
        await self._remove_sandbox()
        if not self.node_gone:
            self.write(_stopped)
            self._kubelet.removed(self._key, self.uid)

    async def _ask(self, grace: float) -> None:
        """SIGTERM, and what it takes to end, at most the grace."""
        if grace <= 0 or self.sandbox is None or self.closed.is_set():
            return
        await self.kill(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                if self._life.done():
                    await self._kubelet.sandboxes.gone(self.sandbox.name, self.sandbox.uid)
                else:
                    await asyncio.wait([self._life])

    async def _stop_life(self) -> None:
        self._life.cancel()
        await asyncio.wait([self._life])

    async def made(self) -> Sandbox | None:
        """Wait for a creation that is under way; the sandbox, if it came to one."""
        if self._making is None:
            return None
        await asyncio.wait([self._making])
        return None if self._making.exception() else self._making.result()

    async def _remove_sandbox(self) -> None:
        sandbox = await self.made()
        if sandbox is not None:
            await self._kubelet.sandboxes.delete(sandbox.name, sandbox.uid)
        self.closed.set()

    def _spec(self) -> SandboxSpec:
        spec, defaults = self.pod["spec"], Limits()
        container = spec["containers"][0]
        limits, given = (
            container["resources"].get("limits", {}),
            dict(LIMIT.findall(" ".join(container.get("command", [])))),
        )
        workspace = next(_sizes(spec), defaults.workspace_bytes)
        return SandboxSpec(
            name=f"pod-{self.uid}",
            session=None,
            memory_bytes=int(quantity(limits.get("memory", defaults.memory_bytes))),
            workspace_bytes=workspace,
            processes=int(given.get("NPROC", defaults.processes)),
            file_bytes=int(given.get("FSIZE", defaults.file_bytes)),
            lifetime_seconds=spec.get("activeDeadlineSeconds") or FOREVER,
        )


class Kubelet:
    """All pods of one server, each a worker of its own."""

    def __init__(self, etcd: Etcd, faults: Faults, root: Path, python: Path | None) -> None:
        self.etcd = etcd
        self.faults = faults
        self.sandboxes = LocalSandboxes(root, limits=Limits(), network="none", python=python)
        self.defects: list[Exception] = []  # of this double, not of what is tried on it
        self._root = root
        self._workers: dict[str, PodWorker] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, key: Key, pod: Object) -> None:
        """A pod was created."""
        self._workers[pod["metadata"]["uid"]] = PodWorker(self, key, pod)

    def worker(self, pod: Object) -> PodWorker:
        """The worker of this incarnation."""
        return self._workers[pod["metadata"]["uid"]]

    def find(self, name: str) -> PodWorker:
        """The worker of the pod that has this name now, in whichever namespace."""
        return next(self.worker(pod) for pod in self.etcd.all("pods") if pod["metadata"]["name"] == name)

    async def connect(self, worker: PodWorker) -> ByteStream:
        """A connection to the agent in the pod. Raises PigeonError."""
        if worker.sandbox is None:
            raise SandboxGone("the pod does not run")
        return await self.sandboxes.connect(worker.sandbox.name, worker.sandbox.uid)

    async def lives(self, sandbox: Sandbox) -> bool:
        """Whether its first process runs."""
        found = await self.sandboxes.get(sandbox.name)
        return found is not None and found.phase is not Phase.ENDED

    def signal(self, sandbox: Sandbox, send: signal.Signals) -> None:
        """Send a signal to the first process of a sandbox."""
        process = Record(self._root / f"{sandbox.name}{OF}{sandbox.uid}").process("init")
        if process is not None and process.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, send)

    async def kill(self, name: str) -> None:
        """The pod's first process is killed, as by somebody on the node."""
        await self.find(name).kill()

    async def out_of_memory(self, name: str) -> None:
        """The kernel kills the container for its memory."""
        await self.find(name).fail(lambda pod: statuses.terminated(pod, statuses.KILLED, "OOMKilled"))

    async def evict(self, name: str, message: str = "The node was low on resource: memory.") -> None:
        """The kubelet evicts the pod: it fails and stays there to be read."""
        await self.find(name).fail(lambda pod: statuses.failed(pod, "Evicted", message))

    async def shut_down_node(self, name: str) -> None:
        """The pod's node is taken away with notice (a spot machine): ended in its grace, and told then only."""
        message = "Pod was terminated in response to imminent node shutdown."
        worker = self.find(name)

        def shut_down(pod: Object) -> None:
            statuses.disrupted(pod, "TerminationByKubelet", message)
            statuses.failed(pod, "Terminated", message)

        await worker.fail(shut_down, worker.pod["spec"]["terminationGracePeriodSeconds"])

    def preempt(self, name: str) -> None:
        """The scheduler deletes the pod to make room for a more important one."""
        message = "default-scheduler: preempting to accommodate a higher priority pod"
        self._disrupt(name, "PreemptionByScheduler", message)

    def drain(self, name: str) -> None:
        """Somebody drains the pod's node, through the eviction API."""
        self._disrupt(name, "EvictionByEvictionAPI", "Eviction API: evicting")

    async def lose_node(self, name: str) -> None:
        """The pod's node vanishes: no more word of it, then the controllers clear it away."""
        worker = self.find(name)
        worker.node_gone = True
        await worker.fail(statuses.node_not_ready)
        self._disrupt(name, "DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint")

    def collect_garbage(self, name: str) -> None:
        """The pod garbage collector removes a pod whose node is gone."""
        worker = self.find(name)
        worker.write(statuses.disrupted, "DeletionByPodGC", "PodGC: node no longer exists")
        worker.node_gone = False
        worker.terminate(0)

    def _disrupt(self, name: str, reason: str, message: str) -> None:
        worker = self.find(name)
        worker.write(statuses.disrupted, reason, message)
        grace = worker.pod["spec"]["terminationGracePeriodSeconds"]
        worker.write(mark_deleted, grace)
        worker.terminate(grace)

    def removed(self, key: Key, uid: str) -> None:
        """Nothing of the pod runs any more: it goes from the API."""
        found = self.etcd.get(key)
        if found is not None and found["metadata"]["uid"] == uid:
            self.etcd.remove(key)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run it until it is done or the kubelet is closed."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self.defects.append(error)

    async def close(self) -> None:
        """End every pod; nothing is left on this machine."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self._workers.values():
            await worker.made()
        for sandbox in await self.sandboxes.list():
            await self.sandboxes.delete(sandbox.name, sandbox.uid)


def mark_deleted(pod: Object, grace: int) -> None:
    """What a graceful deletion writes at once; its time is when the grace is over, in seconds from now."""
    pod["metadata"]["deletionTimestamp"] = timestamp(datetime.now(UTC) + timedelta(seconds=grace))
    pod["metadata"]["deletionGracePeriodSeconds"] = grace


def _sizes(spec: Object) -> Iterator[int]:
    """How large the workspace may become."""
    for volume in spec.get("volumes") or []:
        if volume["name"] == "workspace" and "sizeLimit" in volume.get("emptyDir", {}):
            yield int(quantity(volume["emptyDir"]["sizeLimit"]))


def _ended(pod: Object, reason: str) -> None:
    """A local sandbox's end in the words of a kubelet."""
    if reason == LIFETIME_OVER:
        statuses.failed(pod, "DeadlineExceeded", DEADLINE)
    elif "out of memory" in reason:
        statuses.terminated(pod, statuses.KILLED, "OOMKilled")
    elif found := SIGNAL.search(reason):
        statuses.terminated(pod, 128 + int(found[1]))
    elif found := EXIT_CODE.search(reason):
        statuses.terminated(pod, int(found[1]))
    elif "killed from outside" in reason:
        statuses.terminated(pod, statuses.KILLED)
    else:
        statuses.terminated(pod, 128, "StartError", reason)


def _stopped(pod: Object) -> None:
    """The last status of a pod that was deleted while it ran."""
    if pod["status"]["phase"] == "Running":
        statuses.terminated(pod, statuses.KILLED)
