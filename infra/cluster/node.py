"""The node: the first process of its own process and mount namespaces, which starts the components and keeps them up.

Whatever is mounted and started here, containers included, is gone the moment this process is: the kernel sees to it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.cluster import images
from infra.cluster.layout import HIDDEN, ClusterFailed, Layout
from infra.cluster.parts import Part, parts

LOOK_SECONDS = 0.05
START_SECONDS = 180.0  # of one component, on a machine that is busy with other things
RESTART_SECONDS = 1.0


def run(layout: Layout, kube: Path, snapshotter: str) -> None:
    """Start every component, say that the cluster is ready, and restart whatever ends. Does not return.

    Raises ClusterFailed if one does not come up.
    """
    _own_folders(layout)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # the first process of a namespace ignores it otherwise
    running: dict[int, Part] = {}
    took: dict[str, float] = {}
    for part in parts(layout, kube):
        with _timed(took, part.name):
            running[_start(layout, part)] = part
            _await(part, running, layout)
        if part.name == "containerd":
            with _timed(took, "images"):
                images.load(layout, snapshotter)
    unfinished = layout.ready.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(took))
    unfinished.replace(layout.ready)
    while True:
        _reap(running, layout)


@contextmanager
def _timed(took: dict[str, float], step: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    took[step] = round(time.monotonic() - started, 2)


def _own_folders(layout: Layout) -> None:
    """Give the node a /run, /var/lib and /var/log of its own, so that no path of the machine's is written to."""
    for place in HIDDEN:
        own = layout.node / place.strip("/").replace("/", "-")
        own.mkdir(parents=True, exist_ok=True)
        subprocess.run(("mount", "--bind", str(own), place), check=True)


def _start(layout: Layout, part: Part) -> int:
    with (layout.logs / f"{part.name}.log").open("ab") as log:
        child = subprocess.Popen(part.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=layout.node)
    child.returncode = 0  # waited for by `_reap`, like every orphan of this namespace
    return child.pid


def _await(part: Part, running: dict[int, Part], layout: Layout) -> None:
    until = time.monotonic() + START_SECONDS
    while not _is_up(part):
        if part in _reap(running, layout, os.WNOHANG):
            raise ClusterFailed(f"{part.name} ended at its start: see {part.name}.log")
        if time.monotonic() > until:
            raise ClusterFailed(f"{part.name} did not come up in {START_SECONDS:.0f} s: see {part.name}.log")
        time.sleep(LOOK_SECONDS)


def _is_up(part: Part) -> bool:
    try:
        return part.is_up()
    except OSError:
        return False


def _reap(running: dict[int, Part], layout: Layout, options: int = 0) -> list[Part]:
    """Wait for one process to end; if it was a component, start it again and return it."""
    pid, status = os.waitpid(-1, options)
    part = running.pop(pid, None)
    if not part:
        return []
    print(f"{part.name} ended with {os.waitstatus_to_exitcode(status)}, starting it again", flush=True)  # noqa: T201
    time.sleep(RESTART_SECONDS)
    running[_start(layout, part)] = part
    return [part]


if __name__ == "__main__":
    try:
        run(Layout(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3])
    except ClusterFailed as error:
        sys.exit(str(error))
