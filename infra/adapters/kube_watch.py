"""One watch of the namespace for a whole process: what became of each pod, and who waits for it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from infra.adapters.kube_api import Expired, KubeApi
from infra.adapters.kube_status import DELETED, Pod, read, why_deleted
from schemas.errors import PigeonError
from schemas.ports import Phase

RETRY_MIN_SECONDS, RETRY_MAX_SECONDS = 0.1, 10.0
REMEMBERED = 2_000  # pods that are gone, so that whoever asks late is told why

log = logging.getLogger(__name__)


class PodWatch:
    """The pods as the API server last told, by uid; starts watching when somebody waits for the first time.

    `ended` is called once for every pod that ends or goes while it is watched.
    """

    def __init__(self, api: KubeApi, ended: Callable[[Pod], None]) -> None:
        self._api = api
        self._ended = ended
        self._pods: dict[str, Pod] = {}
        self._gone: OrderedDict[str, Pod] = OrderedDict()
        self._waiting: defaultdict[str, set[asyncio.Future[None]]] = defaultdict(set)
        self._watching: asyncio.Task[None] | None = None
        self._version = ""  # that the next watch starts after; "" lists first

    async def close(self) -> None:
        """Stop watching; who still waits is cancelled by its own owner."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    def observe(self, pod: Pod) -> Pod:
        """Take in what an answer of the API server says; returns the newest that is known of this incarnation."""
        known = self._known(pod.uid)
        if known is not None and (pod.uid in self._gone or known.version >= pod.version):
            return known
        self._change(pod)
        return pod

    def missing(self, uid: str) -> None:
        """Take in that the API server does not have this incarnation any more."""
        if pod := self._pods.get(uid):
            self._remove(_vanished(pod))

    def taken(self, name: str) -> Pod | None:
        """The last pod of that name that the cluster itself took away, if its end was seen and is not long ago."""
        for pod in reversed(self._gone.values()):
            if pod.name == name:
                return pod if pod.disrupted else None
        return None

    async def look(self, name: str, uid: str) -> Pod | None:
        """The pod as it is known, asked for where it is not; None where it is gone for longer than is remembered."""
        self._start()
        known = self._known(uid)
        if known is not None:
            return known
        raw = await self._api.get(name)
        if raw is None or raw["metadata"]["uid"] != uid:
            return self._gone.get(uid)
        return self.observe(read(raw))

    async def change(self, pod: Pod, seconds: float | None = None) -> None:
        """Return once something newer than this is known of the pod, or after so many seconds."""
        self._start()
        if self._known(pod.uid) is not pod:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[pod.uid].add(future)
        try:
            async with asyncio.timeout(seconds):
                await future
        except TimeoutError:
            return
        finally:
            self._forget(pod.uid, future)

    def _known(self, uid: str) -> Pod | None:
        return self._gone.get(uid) or self._pods.get(uid)

    def _forget(self, uid: str, future: asyncio.Future[None]) -> None:
        if waiting := self._waiting.get(uid):
            waiting.discard(future)
            if not waiting:
                del self._waiting[uid]

    def _start(self) -> None:
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        delay = RETRY_MIN_SECONDS
        while True:
            started = asyncio.get_running_loop().time()
            try:
                self._version = self._version or await self._list()
                await self._follow()
            except Expired:
                self._version = ""
            except PigeonError as error:
                log.warning("watching the pods: %s", error)
            except Exception:
                log.exception("watching the pods failed; they are listed anew")
                self._version = ""
            if asyncio.get_running_loop().time() - started > RETRY_MAX_SECONDS:
                delay = RETRY_MIN_SECONDS
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - workers do not come back all at once
            delay = min(2 * delay, RETRY_MAX_SECONDS)

    async def _list(self) -> str:
        """Compare with what there is. The list is consistent: what was known before it was asked for and is missing
        went while nobody looked, and what is older in it went back, as in a cluster restored from a backup."""
        before = dict(self._pods)
        raws, version = await self._api.list()
        listed = {pod.uid: pod for pod in map(read, raws)}
        for uid, pod in [*self._pods.items()]:
            if uid not in listed and (uid in before or pod.version <= int(version)):
                self._remove(_vanished(pod))
            elif uid in listed and listed[uid].version < pod.version and before.get(uid) is pod:
                self._change(listed[uid])
        for pod in listed.values():
            self.observe(pod)
        return version

    async def _follow(self) -> None:
        """Take in events until the server ends the watch; what was taken in is not asked for again."""
        async with self._api.watch(self._version) as events:
            async for kind, raw in events:
                self._event(kind, raw)
                self._version = raw["metadata"]["resourceVersion"]

    def _event(self, kind: str, raw: dict[str, Any]) -> None:
        if kind == "DELETED":
            self._remove(replace(read(raw), reason=why_deleted(raw)))
        elif kind in ("ADDED", "MODIFIED"):
            self.observe(read(raw))

    def _change(self, pod: Pod) -> None:
        before = self._pods.get(pod.uid)
        self._pods[pod.uid] = pod
        self._wake(pod.uid)
        if pod.phase is Phase.ENDED and (before is None or before.phase is not Phase.ENDED):
            self._ended(pod)

    def _remove(self, pod: Pod) -> None:
        before = self._pods.pop(pod.uid, None)
        if pod.uid in self._gone:
            return
        self._gone[pod.uid] = replace(pod, phase=Phase.ENDED)
        while len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)
        self._wake(pod.uid)
        if before is None or before.phase is not Phase.ENDED:
            self._ended(pod)

    def _wake(self, uid: str) -> None:
        for future in self._waiting.get(uid, ()):
            if not future.done():
                future.set_result(None)


def _vanished(pod: Pod) -> Pod:
    """A pod that went while nobody looked, with the last that is known of why."""
    known = pod.leaving or pod.phase is Phase.ENDED
    return replace(pod, reason=pod.reason if known and pod.reason else DELETED)
