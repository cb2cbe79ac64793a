"""Processes by identity rather than by number: a pid that was given to another process is never mistaken."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DEAD = ("Z", "X")  # states of a process that only waits to be reaped


@cache
def boot_id() -> str:
    """The running kernel's boot, a random id."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True, slots=True)
class Process:
    """One process of one boot; `start` is in clock ticks since then."""

    boot: str
    pid: int
    start: int

    def alive(self) -> bool:
        """Whether it still runs; one that only waits to be reaped does not."""
        if self.boot != boot_id():
            return False
        try:
            fields = _stat(self.pid)
        except OSError:
            return False
        return int(fields[19]) == self.start and fields[0] not in DEAD

    def open(self) -> int | None:
        """A pidfd, readable once it has ended; None if it has. The caller closes it."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except OSError:
            return None
        if self.alive():
            return descriptor
        os.close(descriptor)
        return None

    def kill(self, seconds: float) -> bool:
        """Send SIGKILL and wait; whether it has ended within that time."""
        with self._opened() as descriptor:
            if descriptor is None:
                return True
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            return _ended(descriptor, seconds)

    def wait(self, seconds: float) -> bool:
        """Wait for its end; whether it came within that time."""
        with self._opened() as descriptor:
            return descriptor is None or _ended(descriptor, seconds)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int | None]:
        descriptor = self.open()
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)


def descendants(pid: int) -> list[int]:
    """The processes below this one that still run, parents first."""
    children: dict[int, list[int]] = {}
    running: set[int] = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            fields = _stat(int(entry))
            children.setdefault(int(fields[1]), []).append(int(entry))
            if fields[0] not in DEAD:
                running.add(int(entry))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return [each for each in found[1:] if each in running]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on: [0] state, [1] parent, [19] start time. Raises OSError."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def _ended(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
