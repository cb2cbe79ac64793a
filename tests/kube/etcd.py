"""Objects with revisions, and the log of what changed."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from dataclasses import dataclass

from tests.kube.answers import Object, Refused

FIRST_REVISION = 1_000

Key = tuple[str, str, str]  # resource, namespace, name


@dataclass(frozen=True, slots=True)
class Change:
    """One write: what was there before it and what is there after it; None where nothing is."""

    revision: int
    key: Key
    before: Object | None
    after: Object | None
    gone: Object | None = None  # a removed object's last state, at the revision of its removal


class Etcd:
    """The store of one API server. Every write has the next revision; old changes can be compacted away."""

    def __init__(self, *, history: int) -> None:
        self.revision = FIRST_REVISION
        self.compacted = FIRST_REVISION  # changes up to this revision are forgotten
        self._history = history
        self._objects: dict[Key, Object] = {}
        self._log: list[Change] = []
        self._news = asyncio.Event()

    def get(self, key: Key) -> Object | None:
        """A copy of the object, or None."""
        return copy.deepcopy(self._objects.get(key))

    def all(self, resource: str, namespace: str | None = None) -> list[Object]:
        """Copies of the objects of a resource, by namespace and name."""
        keys = sorted(key for key in self._objects if key[0] == resource and namespace in (None, key[1]))
        return [copy.deepcopy(self._objects[key]) for key in keys]

    def put(self, key: Key, new: Object) -> Object:
        """Write the object; one that changes nothing is no write. Returns it with its revision."""
        before = self._objects.get(key)
        if before and {**new, "metadata": {**new["metadata"], "resourceVersion": _revision(before)}} == before:
            return copy.deepcopy(before)
        after = copy.deepcopy(new)
        after["metadata"]["resourceVersion"] = str(self.revision + 1)
        self._objects[key] = after
        self._record(key, before, after)
        return copy.deepcopy(after)

    def change(self, key: Key, uid: str, change: Callable[[Object], None]) -> Object | None:
        """Change the object in place if it is still that incarnation; None if it is not."""
        found = self.get(key)
        if found is None or found["metadata"]["uid"] != uid:
            return None
        change(found)
        return self.put(key, found)

    def remove(self, key: Key) -> Object:
        """Remove the object; returns its last state, at the revision of the removal."""
        gone = copy.deepcopy(self._objects[key])
        gone["metadata"]["resourceVersion"] = str(self.revision + 1)
        self._record(key, self._objects.pop(key), None, gone)
        return copy.deepcopy(gone)

    def since(self, revision: int) -> list[Change]:
        """Every change after that revision. Raises Refused with 410 when it was compacted."""
        if revision < self.compacted:
            raise Refused(410, f"too old resource version: {revision} ({self.compacted})")
        return self._log[revision - self.compacted :]

    async def news(self, revision: int) -> None:
        """Return once there is a change after that revision."""
        while self.revision <= revision:
            await self._news.wait()

    def compact(self, revision: int | None = None) -> None:
        """Forget the changes up to that revision; by default, all."""
        until = self.revision if revision is None else revision
        del self._log[: max(0, until - self.compacted)]
        self.compacted = max(self.compacted, until)

    def _record(self, key: Key, before: Object | None, after: Object | None, gone: Object | None = None) -> None:
        self.revision += 1
        self._log.append(Change(self.revision, key, before, after, gone))
        if len(self._log) > self._history:
            self.compact(self.revision - self._history)
        self._news.set()
        self._news = asyncio.Event()


def _revision(thing: Object) -> str:
    return str(thing["metadata"]["resourceVersion"])
