"""Sandboxes as Kubernetes pods."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from weakref import WeakSet

from infra.adapters.kube_api import KubeApi, kube_api
from infra.adapters.kube_exec import ExecStream
from infra.adapters.kube_helper import helper
from infra.adapters.kube_pod import (
    LABEL,
    SELECTOR,
    SESSION_LABEL,
    agent_digest,
    digest,
    isolation,
    pod,
    unrestricted,
)
from infra.adapters.kube_settings import KubeSettings
from infra.adapters.kube_status import DELETED, Pod, read
from infra.adapters.kube_watch import PodWatch
from schemas.errors import (
    AgentUnreachable,
    AlreadyExists,
    Conflict,
    NoCapacity,
    NotFound,
    SandboxFailed,
    SandboxGone,
    Unavailable,
)
from schemas.limits import MIB
from schemas.ports import ByteStream, Phase, Sandbox, Sandboxes, SandboxSpec

CREATE_TRIES = 5
CLAIM_TRIES = 5
CONFLICT_SECONDS = 0.05  # between two tries while others write
DELETE_GRACE_SECONDS = 1  # the shortest that still waits for the kubelet; what was worth saying has been said
DELETE_SECONDS = 60.0  # a node that does not answer keeps its pods for longer than anybody waits
START_LOOK_SECONDS = 10.0  # between two looks at a pod that starts, should the watch be dead without a word
LOOK_SECONDS = 2.0  # between two looks at a pod that is being deleted, should the watch be away
AGENT_SECONDS = 10.0  # from the container's start until its agent listens, on a busy node
AGENT_RETRY_MIN_SECONDS, AGENT_RETRY_MAX_SECONDS = 0.05, 1.0
GREETING_SECONDS = 10.0  # for the agent's first byte through an exec that was accepted
LAST_WORDS_SECONDS = 3.0  # that a stream has to end by itself once its pod is gone

PROBE = SandboxSpec(
    name="probe",
    session="probe",
    memory_bytes=64 * MIB,
    workspace_bytes=MIB,
    processes=16,
    file_bytes=MIB,
    lifetime_seconds=60,
)

log = logging.getLogger(__name__)


class KubeSandboxes(Sandboxes):
    """The `Sandboxes` port by pods of one namespace. Any worker can do anything with a pod that another one made.

    Capacity is the cluster's own: a ResourceQuota and the room on its nodes.
    """

    def __init__(self, api: KubeApi, settings: KubeSettings) -> None:
        self._api = api
        self._settings = settings
        self._image, self._agent = digest(settings.image), agent_digest()
        self._watch = PodWatch(api, self._cut)
        self._streams: defaultdict[str, WeakSet[ExecStream]] = defaultdict(WeakSet)
        self._cutting: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Stop watching; connections that are open stay their owners' to close."""
        await self._watch.close()
        for task in self._cutting:
            task.cancel()
        await asyncio.gather(*self._cutting, return_exceptions=True)

    async def check_isolation(self) -> str:
        """Ask the cluster whether it would take a session's pod, and one without protection; say what isolates.

        Nothing is started, so it takes milliseconds also where a node would take minutes. Raises SandboxFailed with
        what the cluster misses, or Unavailable.
        """
        probe = pod(PROBE, self._settings)
        try:
            await self._api.try_create(probe)
        except NoCapacity:
            log.info("the cluster is full; what it thinks of our pods was not asked")
        try:
            await self._api.try_create(unrestricted(probe))
        except SandboxFailed:
            enforced = "whose namespace takes no others"
        except NoCapacity:
            enforced = "of which the cluster is full now"
        else:
            enforced = "though their namespace would take others: it does not enforce Pod Security `restricted`"
        return f"{isolation(self._settings)}, {enforced} ({self._settings.namespace} at {self._api.host})"

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """See the port. The cluster's answer is the creation; whether a node has room shows in `running`."""
        body = pod(spec, self._settings)
        may_give_way = spec.session is not None
        for _ in range(CREATE_TRIES):
            try:
                return self._shown(self._seen(await self._api.create(body)))
            except AlreadyExists:
                found = await self._same(spec)
                if found is not None:
                    return self._shown(found)
            except NoCapacity:  # a quota is asked before the name: it may be there already
                if (found := await self._same(spec)) is not None:
                    return self._shown(found)
                if not may_give_way or not await self._give_way():
                    raise
                may_give_way = False
            except Conflict:  # two creates were counted against a quota at once
                await asyncio.sleep(CONFLICT_SECONDS)
        raise Unavailable(f"sandbox {spec.name} could not be created: others kept writing")

    async def _give_way(self) -> bool:
        """End one warm pod in favour of a session; False where there is none. A claim that is faster keeps it."""
        raws, _ = await self._api.list(f"{SELECTOR},!{SESSION_LABEL}")
        idle = [found for raw in raws if not (found := self._seen(raw)).leaving and found.phase is not Phase.ENDED]
        for found in sorted(idle, key=lambda each: each.phase is Phase.RUNNING):  # those on their way first
            try:
                await self._api.delete(found.name, found.uid, grace_seconds=DELETE_GRACE_SECONDS, version=found.version)
            except (NotFound, Conflict):
                continue
            log.info("the warm sandbox %s gives way to a session", found.name)
            await self._removed(found.name, found.uid)
            return True
        return False

    async def _same(self, spec: SandboxSpec) -> Pod | None:
        """The pod that has the name already; None once one that was being deleted is gone. Raises SandboxFailed."""
        raw = await self._api.get(spec.name)
        if raw is None:
            return None
        found = self._seen(raw)
        if found.session != spec.session:
            raise SandboxFailed(f"a sandbox of another session is called {spec.name}")
        if not found.leaving:
            return found
        await self._removed(found.name, found.uid)
        return None

    async def claim(self, name: str, uid: str, session: str) -> Sandbox:
        """See the port. A repeated claim by the session that has it already returns it again."""
        if not LABEL.fullmatch(session):
            raise SandboxFailed(f"not a name for a session: {session!r}")
        for _ in range(CLAIM_TRIES):
            found = await self._fresh(name, uid)
            if found is None or found.phase is Phase.ENDED or found.leaving:
                raise SandboxGone(f"sandbox {name} cannot be claimed: {found.reason if found else DELETED}")
            if found.session == session:
                return self._shown(found)
            if found.session is not None:
                raise Conflict(f"sandbox {name} belongs to another session")
            try:
                return self._shown(self._seen(await self._api.patch(name, _claim(found, session))))
            except NotFound:
                continue
            except Conflict:  # its status changed, or it was claimed: the next look tells
                await asyncio.sleep(0)
        raise Conflict(f"sandbox {name} keeps changing")

    async def get(self, name: str) -> Sandbox | None:
        """See the port. One that the cluster itself took away is remembered for a while, with the reason."""
        raw = await self._api.get(name)
        if raw is not None:
            return self._seen(raw).sandbox()
        taken = self._watch.taken(name)
        return self._shown(taken) if taken else None

    async def find(self, session: str) -> list[Sandbox]:
        """See the port."""
        if not LABEL.fullmatch(session):
            return []
        return [*await self._listed(f"{SELECTOR},{SESSION_LABEL}={session}")]

    async def list(self) -> list[Sandbox]:
        """See the port."""
        return [*await self._listed(SELECTOR)]

    async def _listed(self, selector: str) -> Sequence[Sandbox]:
        raws, _ = await self._api.list(selector)
        return [self._shown(self._seen(raw)) for raw in raws]

    async def delete(self, name: str, uid: str) -> None:
        """See the port. Raises Unavailable when the pod's node does not confirm its end in time."""
        try:
            await self._api.delete(name, uid, grace_seconds=DELETE_GRACE_SECONDS)
        except (NotFound, Conflict):  # gone, or another incarnation's name
            return
        await self._removed(name, uid)

    async def _removed(self, name: str, uid: str) -> None:
        """Return once the pod is gone from the API, which is when its node has ended all of it."""
        try:
            async with asyncio.timeout(DELETE_SECONDS):
                while (found := await self._fresh(name, uid)) is not None:
                    await self._watch.change(found, LOOK_SECONDS)
        except TimeoutError as error:
            raise Unavailable(f"sandbox {name} is being deleted; its node has not confirmed the end") from error

    async def running(self, name: str, uid: str) -> Sandbox:
        """See the port. Raises NoCapacity too, when no node has had room for the pod for `unschedulable_seconds`."""
        gave_way = False
        while True:
            found = await self._living(name, uid)
            if found.phase is Phase.RUNNING:
                return self._shown(found)
            if found.hopeless:
                raise SandboxFailed(f"sandbox {name} cannot be started: {found.reason}")
            if found.crowded_since is not None and found.session is not None and not gave_way:
                gave_way = True  # the scheduler displaces no pod of the same value
                await self._give_way()
            await self._watch.change(found, self._patience(found))
            if await self._watch.look(name, uid) is found:
                await self._fresh(name, uid)

    def _patience(self, found: Pod) -> float:
        """How many seconds to wait for news of a pod that does not run yet. Raises NoCapacity when it has waited for a
        node for too long."""
        if found.crowded_since is None:
            return START_LOOK_SECONDS
        left = found.crowded_since + timedelta(seconds=self._settings.unschedulable_seconds) - datetime.now(UTC)
        if left <= timedelta(0):
            raise NoCapacity(f"sandbox {found.name} found no place: {found.reason}")
        return min(left.total_seconds(), START_LOOK_SECONDS)

    async def gone(self, name: str, uid: str) -> Sandbox:
        """See the port. One that is not there any more is returned as ended, too."""
        while True:
            found = await self._watch.look(name, uid)
            if found is None:
                return Sandbox(name, uid, None, Phase.ENDED, datetime.now(UTC), DELETED)
            if found.phase is Phase.ENDED:
                return self._shown(found)
            await self._watch.change(found)

    async def connect(self, name: str, uid: str) -> ByteStream:
        """See the port. Waits a little for an agent that is just starting."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + AGENT_SECONDS
        delay = AGENT_RETRY_MIN_SECONDS
        while True:
            found = await self._living(name, uid)
            if found.phase is Phase.STARTING:
                raise AgentUnreachable(f"sandbox {name} does not run yet: {found.reason}")
            try:
                return await self._dial(name, uid)
            except NoCapacity:
                raise
            except (Unavailable, NotFound) as error:
                if loop.time() >= deadline:
                    raise AgentUnreachable(f"the agent of sandbox {name} does not answer: {error}") from error
            with contextlib.suppress(Unavailable):  # it may have ended, and the watch is late
                await self._fresh(name, uid)
            await asyncio.sleep(delay)
            delay = min(2 * delay, AGENT_RETRY_MAX_SECONDS)

    async def _dial(self, name: str, uid: str) -> ExecStream:
        """Execute the helper and wait for the agent's first byte. Raises AgentUnreachable or NotFound."""
        stream = await self._api.execute(name, helper())
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                if not await stream.speaks():
                    raise AgentUnreachable(stream.why())
            await self._fresh(name, uid)  # exec goes by the name: it must have been this incarnation's throughout
            await self._living(name, uid)
        except TimeoutError as error:
            await stream.close()
            raise AgentUnreachable("it says nothing") from error
        except BaseException:
            await stream.close()
            raise
        self._streams[uid].add(stream)
        return stream

    async def _living(self, name: str, uid: str) -> Pod:
        """The pod if it has not ended. Raises SandboxGone, SandboxFailed or NoCapacity."""
        found = await self._watch.look(name, uid)
        if found is None:
            raise SandboxGone(f"sandbox {name} is not there any more")
        if found.phase is not Phase.ENDED:
            return found
        if found.crowded_since is not None:
            raise NoCapacity(f"sandbox {name} found no place: {found.reason}")
        raise (SandboxFailed if found.hopeless else SandboxGone)(f"sandbox {name} has ended: {found.reason}")

    async def _fresh(self, name: str, uid: str) -> Pod | None:
        """The pod as the API server has it now, or None."""
        try:
            raw = await self._api.get(name)
        except NotFound:
            return None
        if raw is None or raw["metadata"]["uid"] != uid:
            self._watch.missing(uid)
            return None
        return self._seen(raw)

    def _shown(self, found: Pod) -> Sandbox:
        return found.sandbox(image=self._image, agent=self._agent)

    def _seen(self, raw: dict[str, Any]) -> Pod:
        return self._watch.observe(read(raw))

    def _cut(self, ended: Pod) -> None:
        """Connections to a pod that has ended do not always end."""
        for stream in self._streams.pop(ended.uid, ()):
            task = asyncio.create_task(stream.close_after(LAST_WORDS_SECONDS))
            self._cutting.add(task)
            task.add_done_callback(self._cutting.discard)


def _claim(found: Pod, session: str) -> dict[str, Any]:
    """The patch that gives a pod to a session, if it is still as it was found."""
    return {"metadata": {"uid": found.uid, "resourceVersion": str(found.version), "labels": {SESSION_LABEL: session}}}


@asynccontextmanager
async def kube_sandboxes(settings: KubeSettings) -> AsyncIterator[KubeSandboxes]:
    """Sandboxes in the cluster that the settings name. Raises NoCluster where none can be reached."""
    async with kube_api(settings) as api:
        sandboxes = KubeSandboxes(api, settings)
        try:
            yield sandboxes
        finally:
            await sandboxes.close()
