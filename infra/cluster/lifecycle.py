"""Bringing the cluster up, taking it down, and saying how it is."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.cluster import build, certificates, configuration, images, machine
from infra.cluster.api import Api
from infra.cluster.layout import ROOT, ClusterFailed, Layout
from infra.cluster.parts import node_is_ready, ports

READY_SECONDS = 600.0  # all components together, on a machine that is busy with other things
END_SECONDS = 30.0
LOOK_SECONDS = 0.1
LOG_TAIL_BYTES = 2_000
NAMESPACES = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc")


@dataclass(frozen=True, slots=True)
class Running:
    """The node's process, 0 before there is one, with its start time against a reused id; and what to put back."""

    settings: dict[str, str]
    snapshotter: str = ""
    pid: int = 0
    started: str = ""

    @property
    def alive(self) -> bool:
        """Whether it is still there."""
        return bool(self.pid) and start_time(self.pid) == self.started


def up(layout: Layout) -> None:
    """Bring the cluster up, or wait until it is. Raises ClusterFailed, with nothing left but logs, if it cannot."""
    _check_machine()
    with _locked(layout):
        running = _running(layout)
        try:
            if not (running and running.alive):
                _take_down(layout)
                machine.install()
                _start(layout, build.kube_binary())
            _await_ready(layout)
        except BaseException:
            _take_down(layout)
            raise


def down(layout: Layout) -> None:
    """End the cluster and take away all it made, apart from its logs. Raises ClusterFailed if something stays."""
    _check_machine()
    with _locked(layout):
        _take_down(layout)


def load(layout: Layout) -> None:
    """Renew the images of a cluster that runs: pods made from now on have the agent as it is now.

    Raises ClusterFailed where no cluster runs.
    """
    _check_machine()
    with _locked(layout):
        running = _running(layout)
        if not (running and running.alive):
            raise ClusterFailed("no cluster runs here")
        images.write_all(layout)
        images.load(layout, running.snapshotter)


def load_archive(layout: Layout, archive: Path) -> None:
    """Give a cluster that runs one image more, from an archive. Raises ClusterFailed where no cluster runs."""
    with _locked(layout):
        running = _running(layout)
        if not (running and running.alive):
            raise ClusterFailed("no cluster runs here")
        images.load_archive(layout, running.snapshotter, archive)


def is_ready(layout: Layout) -> bool:
    """Whether a pod could be run now."""
    running = _running(layout)
    try:
        return bool(running and running.alive and layout.ready.exists() and node_is_ready(Api(layout)))
    except OSError:
        return False


def steps(layout: Layout) -> dict[str, float]:
    """The seconds that each step of the start took."""
    found: dict[str, float] = json.loads(layout.ready.read_text())
    return found


def start_time(pid: int) -> str:
    """When the process started, in the kernel's ticks; "" for one that is gone or a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state == "Z" else fields[18]


def _start(layout: Layout, kube: Path) -> None:
    _check_alone()
    settings = machine.settings()
    _note(layout, Running(settings))  # first, so that whatever happens next can be undone
    snapshotter = machine.snapshotter(layout.state / "overlay")
    certificates.write_all(layout)
    _write_configuration(layout, snapshotter)
    images.write_all(layout)
    (layout.state / "kubectl").symlink_to(kube)
    machine.connect(_name(layout))
    machine.make_cgroups()
    command = (*NAMESPACES, sys.executable, "-m", "infra.cluster.node", str(layout.state), str(kube), snapshotter)
    with (layout.logs / "node.log").open("wb") as log:
        node = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=machine.enter_cgroups,  # noqa: PLW1509 - no threads here
        )
    _note(layout, Running(settings, snapshotter, node.pid, start_time(node.pid)))
    node.returncode = 0  # it stays when this program ends


def _write_configuration(layout: Layout, snapshotter: str) -> None:
    for folder in (layout.config / "cni", layout.logs, layout.node / "volume-plugins"):
        folder.mkdir(parents=True, exist_ok=True)
    for log in layout.logs.glob("*.log"):
        log.unlink()
    restrict_oom = not machine.may_lower_oom_scores()
    containerd = configuration.containerd(layout, snapshotter=snapshotter, restrict_oom=restrict_oom)
    (layout.config / "containerd.toml").write_text(containerd)
    (layout.config / "cni" / "10-pigeon.conflist").write_text(json.dumps(configuration.network(layout)))
    (layout.config / "kubelet.json").write_text(json.dumps(configuration.kubelet(layout), indent=1))
    shutil.copyfile("/etc/resolv.conf", layout.config / "resolv.conf")  # which may be a link to the machine's /run


def _await_ready(layout: Layout) -> None:
    until = time.monotonic() + READY_SECONDS
    while not (layout.ready.exists() and is_ready(layout)):
        running = _running(layout)
        if not (running and running.alive):
            raise ClusterFailed(f"the node has ended; the logs are in {layout.logs}\n{_tail(layout.logs / 'node.log')}")
        if time.monotonic() > until:
            raise ClusterFailed(f"not ready after {READY_SECONDS:.0f} s; the logs are in {layout.logs}")
        time.sleep(LOOK_SECONDS)


def _take_down(layout: Layout) -> None:
    running = _running(layout)
    if running:
        if running.alive:
            _end(running)
        if machine.owner() in ("", _name(layout)):  # else another cluster has come since this one crashed
            machine.disconnect()
            machine.remove_cgroups()
            machine.restore(running.settings)
    for path in layout.state.iterdir():
        if path not in (layout.logs, _lock(layout), layout.running):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    layout.running.unlink(missing_ok=True)  # last, so that an interrupted `down` can be run again


def _end(running: Running) -> None:
    """End the first process of the namespaces, and with it all others; its parent ends once the last one has."""
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    for pid in [int(child) for child in children] or [running.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + END_SECONDS
    while running.alive:
        if time.monotonic() > until:
            raise ClusterFailed(f"process {running.pid} does not end")
        time.sleep(LOOK_SECONDS)


def _running(layout: Layout) -> Running | None:
    try:
        return Running(**json.loads(layout.running.read_text()))
    except FileNotFoundError:
        return None


def _note(layout: Layout, running: Running) -> None:
    unfinished = layout.running.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(asdict(running)))
    unfinished.replace(layout.running)


def _check_machine() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise ClusterFailed(
            "the cluster runs on Linux, as root: its node makes namespaces, control groups and a bridge"
        )


def _check_alone() -> None:
    if owner := machine.owner():
        raise ClusterFailed(f"the bridge is another cluster's: python -m infra.cluster down --state {owner}")
    for host, port in ports():
        with suppress(OSError), socket.create_connection((host, port), timeout=1):
            raise ClusterFailed(f"port {port} of {host} is taken: is there another cluster?")


def _name(layout: Layout) -> str:
    return str(layout.state)[-machine.MAX_ALIAS :]


def _lock(layout: Layout) -> Path:
    return layout.state / "lock"


@contextmanager
def _locked(layout: Layout) -> Iterator[None]:
    layout.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _lock(layout).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tail(log: Path) -> str:
    with suppress(FileNotFoundError):
        return log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
    return ""
