"""One sandbox of this machine, as a directory NAME@UID that any process of the same user can read and act on.

| file | written by | what |
| --- | --- | --- |
| meta.json | creator, claimer | who it is and what it was given |
| agent.sock | creator | where its agent listens |
| launching | creator | locked for as long as the launch is under way |
| process.json | launcher | its first process and the monitor of it, before either does anything |
| failure | launcher | why it could not be started |
| status | monitor | `{"exit-code": N}` as the last line, once it has ended |
| log | launcher, monitor, agent | what they printed; the sandbox's own output is not there |
| reason | whoever ends it | why, in plain words |

Everything here blocks for at most milliseconds, except where it says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from infra.local import cgroups
from infra.local.sandbox_process import Process, boot_id, descendants
from schemas.errors import Unavailable
from schemas.ports import Phase, Sandbox

OF = "@"  # between name and uid: an incarnation is never mistaken for another one of its name
LIFETIME_OVER = "its lifetime is over"
KILL_SECONDS = 10.0  # a killed process that is not gone by then hangs in the kernel
MONITOR_SECONDS = 0.5  # the monitor writes the exit code within milliseconds
GOT_NOWHERE = (1, 2, 126, 127)  # exit codes of a program that could not be executed, or broke down at once
LOG_TAIL = 500  # characters of the log in a reason


@dataclass(frozen=True, slots=True)
class Meta:
    """What is fixed when a sandbox is made; only a claim changes its session."""

    name: str
    uid: str
    session: str | None
    created_at: str
    lifetime_seconds: int
    host_uid: int | None
    cgroups: list[str]
    sandboxed: bool

    def over(self) -> bool:
        """Whether its lifetime is."""
        created_at = datetime.fromisoformat(self.created_at)
        return datetime.now(UTC) >= created_at + timedelta(seconds=self.lifetime_seconds)


class Record:
    """The directory of one sandbox. Reads what is there now, every time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.name = directory.name.partition(OF)[0]

    def meta(self) -> Meta | None:
        """None where there is no such sandbox (any more)."""
        found = self._json("meta.json")
        return Meta(**found) if found else None

    def write_meta(self, meta: Meta) -> None:
        """Replace the description, whole or not at all."""
        self.write("meta.json", json.dumps(asdict(meta)))

    def look(self) -> Sandbox | None:
        """The sandbox as it is now, None where there is none. One whose lifetime is over is ended by looking at it."""
        meta = self.meta()
        if meta is None:
            return None
        sandbox = self._look(meta)
        # what was read while the directory was being removed says nothing
        return sandbox if sandbox.phase is not Phase.ENDED or self.directory.exists() else None

    def _look(self, meta: Meta) -> Sandbox:
        created_at = datetime.fromisoformat(meta.created_at)
        sandbox = Sandbox(meta.name, meta.uid, meta.session, Phase.RUNNING, created_at)
        init = self.process("init")
        if init is None and self.launching():
            return replace(sandbox, phase=Phase.STARTING, reason="it is being started")
        init = init or self.process("init")  # the launch may have succeeded in between
        if init is None:
            self.end(meta, "")  # its launcher was killed half way
        if init and init.alive():
            if not meta.over():
                return sandbox
            self.end(meta, LIFETIME_OVER)
        return replace(sandbox, phase=Phase.ENDED, reason=self._why(meta))

    def process(self, role: str) -> Process | None:
        """Its `init` (the agent) or `monitor` (bwrap outside of it), once it was launched."""
        found = self._json("process.json")
        return Process(found["boot"], **found[role]) if found and role in found else None

    def launching(self) -> bool:
        """Whether its launch is under way."""
        return not self._lock(fcntl.LOCK_SH | fcntl.LOCK_NB)

    def await_launch(self) -> None:
        """Block until its launch is over, well or ill: tens of milliseconds, bounded by the launcher's alarm."""
        self._lock(fcntl.LOCK_SH)

    def end(self, meta: Meta, reason: str) -> None:
        """End all that runs of it and wait for that. Raises Unavailable if something cannot be ended."""
        self.await_launch()
        with contextlib.suppress(OSError):
            if reason and not (self.directory / "reason").exists():
                self.write("reason", reason)
        init, monitor = self.process("init"), self.process("monitor")
        if monitor and (init is None or not meta.sandboxed):
            self._end_tree(monitor)
        for process in (init, monitor):
            if process and not process.kill(KILL_SECONDS):
                raise Unavailable(f"a process of sandbox {meta.name} does not end: pid {process.pid}")
        cgroups.kill(meta.cgroups)

    def failed(self) -> bool:
        """Whether it ended by not getting anywhere: no isolation, no interpreter, a broken agent."""
        if self.process("init") is None:
            return (self.directory / "failure").exists()
        code = self._exit_code()
        return code in GOT_NOWHERE or (code is None and bool(self._text("log")))

    def write(self, name: str, content: str) -> None:
        """Write a file of it, whole or not at all."""
        new = self.directory / f"{name}.{os.getpid()}.new"
        new.write_text(content)
        new.rename(self.directory / name)

    def _end_tree(self, root: Process) -> None:
        """Where no pid namespace is known of, the kernel does not end what a process leaves behind."""
        until = time.monotonic() + KILL_SECONDS
        while root.alive() and (pids := descendants(root.pid)) and time.monotonic() < until:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)

    def _why(self, meta: Meta) -> str:
        init, monitor = self.process("init"), self.process("monitor")
        if init is None:
            return f"it could not be started: {self._text('failure') or 'its launch was cut short'}"
        if init.boot != boot_id():
            return "the machine was started anew"
        if monitor:
            monitor.wait(MONITOR_SECONDS)
        return self._text("reason") or self._how(meta, self._exit_code())

    def _how(self, meta: Meta, code: int | None) -> str:
        log, killed = self._text("log"), cgroups.oom_kills(meta.cgroups)
        if code in (None, 137) and killed:
            return f"it ran out of memory: the kernel killed {killed} of its processes"
        if code is None and meta.over():
            return LIFETIME_OVER
        if code is None:
            return f"it could not be set up: {log}" if log else "it was killed from outside, monitor included"
        if code > 128:
            return f"it was killed from outside (signal {code - 128})"
        return f"its agent ended with exit code {code}" + (f": {log}" if code and log else "")

    def _exit_code(self) -> int | None:
        for line in reversed(self._text("status").splitlines()):
            with contextlib.suppress(ValueError, KeyError):
                return int(json.loads(line)["exit-code"])
        return None

    def _text(self, name: str) -> str:
        try:
            return (self.directory / name).read_text(errors="replace").strip()[-LOG_TAIL:]
        except OSError:
            return ""

    def _json(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.directory / name).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found

    def _lock(self, operation: int) -> bool:
        """Whether the launch lock could be had; it is given back at once."""
        try:
            with (self.directory / "launching").open() as file:
                fcntl.flock(file, operation)
        except FileNotFoundError:
            return True
        except BlockingIOError:
            return False
        return True
