"""What processes cost, as /proc says."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from infra.local.sandbox_process import descendants

TICKS = os.sysconf("SC_CLK_TCK")


def family(roots: Iterable[int]) -> list[int]:
    """These processes and all below them, each once."""
    return list(dict.fromkeys(each for root in roots for each in (root, *descendants(root))))


def cpu_seconds(pids: Iterable[int]) -> float:
    """What these processes, and children of theirs that have ended, have used so far."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            total += sum(map(int, fields[11:15]))
    return total / TICKS


class Meter:
    """What groups of processes use from now on. One that ends meanwhile counts no more: it may be anybody's."""

    def __init__(self, groups: Mapping[str, Iterable[int]]) -> None:
        self._began = {who: {pid: cpu_seconds([pid]) for pid in pids} for who, pids in groups.items()}

    def seconds(self) -> dict[str, float]:
        """The CPU seconds of each group."""
        return {
            who: sum(max(0.0, cpu_seconds([pid]) - before) for pid, before in began.items())
            for who, began in self._began.items()
        }


def pod_cpu_seconds(pid: int) -> float:
    """What everything in the pod of this process has used, also what has ended, as the control group above its
    container's says; 0 where that cannot be seen."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        group = Path("/sys/fs/cgroup", *(["cpuacct"] if "cpuacct" in controllers else [])) / path[1:]
        with contextlib.suppress(OSError):
            if "cpuacct" in controllers:
                return int((group.parent / "cpuacct.usage").read_text()) / 1e9
            if number == "0":
                return int((group.parent / "cpu.stat").read_text().split()[1]) / 1e6
    return 0.0


def memory_bytes(pids: Iterable[int]) -> int:
    """Their proportional set size: a page shared by three counts a third for each."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def program(pid: int) -> str:
    """The name of a process's program, "" once it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
