"""Memory and process limits by cgroup: version 1 or 2, as root or where a subtree is delegated to this user.

Everything here is blocking and quick. Where no cgroup can be had, `create` returns no directories and the caller
limits by other means.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

CONTROLLERS = ("memory", "pids")
REMOVE_SECONDS = 2.0  # a cgroup stays busy for a moment after its last process has gone


def directories(name: str) -> list[str]:
    """Where cgroups of this name can be made; none where that is impossible here."""
    try:
        return [str(base / name) for base in _bases()]
    except OSError:
        return []


def create(paths: Sequence[str], *, memory_bytes: int, processes: int) -> None:
    """Make these cgroups with these limits. Raises OSError where one cannot be made."""
    for path in map(Path, paths):
        path.mkdir()
        if (path / "memory.max").exists():
            _write(path / "memory.max", memory_bytes)
            _write(path / "memory.swap.max", 0, optional=True)
        if (path / "memory.limit_in_bytes").exists():
            _write(path / "memory.limit_in_bytes", memory_bytes)
            _write(path / "memory.memsw.limit_in_bytes", memory_bytes, optional=True)
        if (path / "pids.max").exists():
            _write(path / "pids.max", processes)


def remove(directories: Iterable[str]) -> None:
    """Remove cgroups in which nothing runs any more; those already gone are fine."""
    until = time.monotonic() + REMOVE_SECONDS
    for directory in directories:
        while True:
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                pass
            except OSError:
                if time.monotonic() < until:
                    time.sleep(0.005)
                    continue
            break


def kill(directories: Iterable[str]) -> None:
    """Send SIGKILL to whatever runs in these cgroups."""
    for directory in directories:
        with contextlib.suppress(OSError):
            for pid in Path(directory, "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def oom_kills(directories: Sequence[str]) -> int:
    """How many processes in these cgroups the kernel has killed for lack of memory."""
    for directory in directories:
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                fields = dict(line.split(maxsplit=1) for line in Path(directory, name).read_text().splitlines())
                return int(fields.get("oom_kill", 0))
    return 0


def delegated(own: Path) -> Path | None:
    """The nearest version 2 cgroup, from ours up, whose children have both controllers and that takes more of them."""
    for directory in (own, *own.parents):
        try:
            enabled = (directory / "cgroup.subtree_control").read_text().split()
        except OSError:
            return None
        if set(CONTROLLERS) <= set(enabled):
            writable = os.access(directory, os.W_OK) and os.access(directory / "cgroup.procs", os.W_OK)
            return directory if writable else None
    return None


def own(membership: str, mountinfo: str) -> dict[str, Path]:
    """A process's own cgroup directories by controller, "" for the unified hierarchy.

    Takes the contents of /proc/self/cgroup and /proc/self/mountinfo.
    """
    mounts = list(_hierarchies(mountinfo))
    found: dict[str, Path] = {}
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            for names, root, mountpoint in mounts:
                if controller in names and f"{path}/".startswith(f"{root}/"):
                    found[controller] = mountpoint / path.removeprefix(root).lstrip("/")
    return found


def _bases() -> list[Path]:
    """The directories under which cgroups can be made."""
    ours = own(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text())
    if "" in ours and (unified := delegated(ours[""])):
        return [unified]
    bases = [ours[controller] for controller in CONTROLLERS if controller in ours]
    return bases if len(bases) == len(CONTROLLERS) and all(os.access(base, os.W_OK) for base in bases) else []


def _hierarchies(mountinfo: str) -> Iterable[tuple[set[str], str, Path]]:
    """Mounted hierarchies: their controllers, the cgroup at their root ("" for the top), and where they are mounted."""
    for line in mountinfo.splitlines():
        fields, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2)
        root, mountpoint = fields.split(" ")[3:5]
        if kind in ("cgroup", "cgroup2"):
            controllers = {""} if kind == "cgroup2" else set(options.split(","))
            yield controllers, root.rstrip("/"), Path(mountpoint)


def _write(path: Path, value: int, *, optional: bool = False) -> None:
    try:
        path.write_text(str(value))
    except OSError:
        if not optional:
            raise
