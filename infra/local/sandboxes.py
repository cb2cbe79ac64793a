"""Sandboxes on this machine: one bubblewrap jail and one directory each.

Nothing is kept in memory: any process of the same user with the same root can list, connect to, wait for and delete
what another process made, whether that one lives or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, ParamSpec, TextIO, TypeVar

from infra.local import cgroups
from infra.local.sandbox_plan import launch
from infra.local.sandbox_probe import PROBE_SECONDS, advice, isolation, probe_spec
from infra.local.sandbox_python import ensure_python
from infra.local.sandbox_record import OF, Meta, Record
from infra.local.sandbox_stream import UnixStream, dial, listen
from schemas.errors import AgentUnreachable, Conflict, NoCapacity, SandboxFailed, SandboxGone, Unavailable
from schemas.ids import new_id
from schemas.limits import Limits
from schemas.ports import ByteStream, Phase, Sandbox, Sandboxes, SandboxSpec

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # what Kubernetes takes as a pod's name and label
LEFT = re.compile(r"\.[0-9a-f]{32}")  # a directory that is being made, under the lock, or removed
HOST_UIDS = range(200_001, 260_000)  # as root, every sandbox runs as a user of its own
RETRY_SECONDS = 0.02  # between two looks at something that changes within milliseconds

P = ParamSpec("P")
T = TypeVar("T")


class LocalSandboxes(Sandboxes):
    """The `Sandboxes` port by bubblewrap; with `unsafe`, by plain processes that nothing isolates.

    `network` "host" shares the machine's network with every sandbox. `python` is the interpreter they offer; by
    default the environment next to `root`, which is made at the first create if nobody has done it before.
    """

    def __init__(
        self,
        root: Path,
        *,
        limits: Limits,
        network: Literal["none", "host"] = "none",
        unsafe: bool = False,
        python: Path | None = None,
    ) -> None:
        self._root = root.absolute()
        self._limits = limits
        self._network: Literal["none", "host"] = network
        self._unsafe = unsafe
        self._python = python

    async def check_isolation(self) -> str:
        """Try one sandbox from start to end and say what isolates sessions here; for the start of a stack.

        Takes about as long as a session's start. Raises SandboxFailed with what to do where there is no isolation.
        """
        if self._unsafe:
            return "no sandbox: sessions are plain processes of this user"
        probe = LocalSandboxes(
            self._root / ".probe", limits=self._limits, network=self._network, python=await _blocking(self._interpreter)
        )
        try:
            sandbox = await probe.create(probe_spec(self._limits))
            try:
                async with asyncio.timeout(PROBE_SECONDS):
                    await probe.running(sandbox.name, sandbox.uid)
                return await _blocking(isolation, probe._record(sandbox.name, sandbox.uid))
            finally:
                await probe.delete(sandbox.name, sandbox.uid)
        except (SandboxFailed, SandboxGone, TimeoutError) as error:
            raise SandboxFailed(advice(str(error) or "the sandbox did not come to run")) from error

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """See the port. The launch is over when this returns, so the sandbox is a few milliseconds from running."""
        return await _blocking(self._create, spec)

    async def claim(self, name: str, uid: str, session: str) -> Sandbox:
        """See the port. A repeated claim by the session that has it already returns it again."""
        return await _blocking(self._claim, name, uid, session)

    async def get(self, name: str) -> Sandbox | None:
        """See the port."""
        return await _blocking(self._get, name)

    async def find(self, session: str) -> list[Sandbox]:
        """See the port."""
        return [sandbox for sandbox in await self.list() if sandbox.session == session]

    async def list(self) -> list[Sandbox]:
        """See the port. Ends those whose lifetime is over."""
        return [*await _blocking(self._all)]

    async def delete(self, name: str, uid: str) -> None:
        """See the port."""
        await _blocking(self._delete, name, uid)

    async def running(self, name: str, uid: str) -> Sandbox:
        """See the port. It is running once its agent has said its first word."""
        while True:
            sandbox = await self._living(name, uid)
            stream = await self._dial(name, uid)
            if stream:
                try:
                    if await stream.read(1):
                        return replace(sandbox, phase=Phase.RUNNING, reason="")
                finally:
                    await stream.close()
            await asyncio.sleep(RETRY_SECONDS)

    async def gone(self, name: str, uid: str) -> Sandbox:
        """See the port. One that is not there any more is returned as ended, too."""
        record = self._record(name, uid)
        while True:
            sandbox = await _blocking(record.look)
            if sandbox is None:
                return Sandbox(name, uid, None, Phase.ENDED, datetime.now(UTC), "it was deleted")
            if sandbox.phase is Phase.ENDED:
                return sandbox
            await _blocking(record.await_launch)
            await _until_ended(record, sandbox)

    async def connect(self, name: str, uid: str) -> ByteStream:
        """See the port."""
        await self._living(name, uid)
        stream = await self._dial(name, uid)
        if stream is None:
            await self._living(name, uid)
            raise AgentUnreachable(f"the agent of sandbox {name} does not listen")
        return stream

    async def _living(self, name: str, uid: str) -> Sandbox:
        """The sandbox if it has not ended. Raises SandboxGone or SandboxFailed."""
        record = self._record(name, uid)
        sandbox = await _blocking(record.look)
        if sandbox is None:
            raise SandboxGone(f"sandbox {name} is not there any more")
        if sandbox.phase is Phase.ENDED:
            failed = await _blocking(record.failed)
            raise (SandboxFailed if failed else SandboxGone)(f"sandbox {name} has ended: {sandbox.reason}")
        return sandbox

    async def _dial(self, name: str, uid: str) -> UnixStream | None:
        return await dial(self._record(name, uid).directory / "agent.sock")

    def _create(self, spec: SandboxSpec) -> Sandbox:
        if not NAME.fullmatch(spec.name):
            raise SandboxFailed(f"not a name for a sandbox: {spec.name!r}")
        python = self._interpreter()
        with self._locked():
            found = self._get(spec.name)
            if found and found.session == spec.session:
                return found
            if found:
                raise SandboxFailed(f"a sandbox of another session is called {spec.name}")
            self._admit(spec.session)
            meta = self._describe(spec)
            record = self._record(meta.name, meta.uid)
            listener, lock = self._prepare(record, meta)
        try:
            with listener, lock:
                launch(
                    record.directory, listener.fileno(), lock.fileno(), meta, spec, python=python, network=self._network
                )
        except BaseException:
            self._delete(meta.name, meta.uid)
            raise
        return record.look() or Sandbox(meta.name, meta.uid, meta.session, Phase.ENDED, datetime.now(UTC), "deleted")

    def _interpreter(self) -> Path:
        return self._python or ensure_python(self._root.parent)

    def _admit(self, session: str | None) -> None:
        taken = sum(each.session is not None and each.phase is not Phase.ENDED for each in self._all())
        if session is not None and taken >= self._limits.capacity:
            raise NoCapacity(f"{taken} of {self._limits.capacity} sandboxes are in use")

    def _describe(self, spec: SandboxSpec) -> Meta:
        uid = new_id()
        return Meta(
            name=spec.name,
            uid=uid,
            session=spec.session,
            created_at=datetime.now(UTC).isoformat(),
            lifetime_seconds=spec.lifetime_seconds,
            host_uid=self._free_host_uid(uid) if os.geteuid() == 0 and not self._unsafe else None,
            cgroups=cgroups.directories(f"pigeon-{uid}"),
            sandboxed=not self._unsafe,
        )

    def _free_host_uid(self, uid: str) -> int:
        """A user id that no other sandbox here has; it starts from the uid, so that other roots rarely clash."""
        taken = {meta.host_uid for record in self._records() if (meta := record.meta())}
        start = int(uid, 16) % len(HOST_UIDS)
        return next(one for step in range(len(HOST_UIDS)) if (one := HOST_UIDS[start - step]) not in taken)

    def _prepare(self, record: Record, meta: Meta) -> tuple[socket.socket, TextIO]:
        """Make the directory, whole or not at all; returns the listening socket and the file locked for the launch."""
        for left in filter(LEFT.fullmatch, os.listdir(self._root)):  # by a process that was killed half way
            shutil.rmtree(self._root / left, ignore_errors=True)
        new = Record(self._root / f".{meta.uid}")
        new.directory.mkdir(mode=0o700)
        new.write_meta(meta)
        with contextlib.ExitStack() as held:
            listener = held.enter_context(listen(new.directory / "agent.sock"))
            lock = held.enter_context((new.directory / "launching").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            new.directory.rename(record.directory)
            held.pop_all()
        return listener, lock

    def _claim(self, name: str, uid: str, session: str) -> Sandbox:
        record = self._record(name, uid)
        with self._locked():
            meta, sandbox = record.meta(), record.look()
            if meta is None or sandbox is None:
                raise SandboxGone(f"sandbox {name} is not there any more")
            if meta.session not in (None, session):
                raise Conflict(f"sandbox {name} belongs to another session")
            if sandbox.phase is Phase.ENDED:
                raise SandboxGone(f"sandbox {name} has ended: {sandbox.reason}")
            if meta.session is None:
                self._admit(session)
            record.write_meta(replace(meta, session=session))
            return replace(sandbox, session=session)

    def _get(self, name: str) -> Sandbox | None:
        found = (record.look() for record in self._records() if record.name == name)
        return next(filter(None, found), None)

    def _all(self) -> Sequence[Sandbox]:
        return [sandbox for record in self._records() if (sandbox := record.look())]

    def _delete(self, name: str, uid: str) -> None:
        record = self._record(name, uid)
        if meta := record.meta():
            record.end(meta, "it was deleted")
            self._remove(record, meta)

    def _remove(self, record: Record, meta: Meta) -> None:
        """Remove what is left of a sandbox in which nothing runs any more."""
        cgroups.remove(meta.cgroups)
        left = self._root / f".{meta.uid}"
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            record.directory.rename(left)
        shutil.rmtree(left, ignore_errors=True)

    def _record(self, name: str, uid: str) -> Record:
        return Record(self._root / f"{name}{OF}{uid}")

    def _records(self) -> Iterator[Record]:
        with contextlib.suppress(FileNotFoundError):
            for entry in sorted(os.listdir(self._root)):
                if OF in entry:
                    yield Record(self._root / entry)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Names, capacity and claims are decided by one process at a time."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self._root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


async def _until_ended(record: Record, sandbox: Sandbox) -> None:
    """Return when its first process has ended or its lifetime is over."""
    process = record.process("init")
    descriptor = process.open() if process else None
    meta = record.meta()
    if descriptor is None or meta is None:
        await asyncio.sleep(RETRY_SECONDS)  # something is being written right now
        return
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    left = sandbox.created_at + timedelta(seconds=meta.lifetime_seconds) - datetime.now(UTC)
    loop.add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(left.total_seconds()):
            await ended.wait()
    except TimeoutError:
        return  # the next look at it ends it
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def _blocking(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run it in a thread; what the machine refuses (disk, processes, descriptors) may work later."""
    try:
        return await asyncio.to_thread(work, *args, **kwargs)
    except OSError as error:
        raise Unavailable(f"this machine refused: {error}") from error
