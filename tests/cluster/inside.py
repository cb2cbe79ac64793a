"""Runs inside a session's pod and tries to get out, beside what tests/isolation/attempts.py tries in any sandbox.

Standard library only; both files lie in the workspace as they do in the repository. The outcomes go to result.json.
"""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.isolation.attempts import ATTEMPTS as ANYWHERE
from tests.isolation.attempts import GIVEN, kept_out, opening, outcome, reading

CONNECT_SECONDS = 3.0
TARGETS = (
    "the API server's service",
    "kubernetes.default",
    "the API server where its administrator reaches it",
    "the API server on the node",
    "the node's kubelet",
    "the node's kubelet, where it asks for no proof",
    "etcd on the node",
    "a server on the node",
    "the metadata server",
    "the metadata server of GKE",
    "the metadata server by its name",
    "another session",
)
ACCOUNTS = ("/var/run/secrets", "/run/secrets", "/var/lib/kubelet", "/etc/kubernetes", "/workspace/.kube")
SOCKETS = ("/run/containerd/containerd.sock", "/var/run/docker.sock", "/var/run/crio/crio.sock")
LAST_WORDS = "/dev/termination-log"
OWN_FILES = {"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", LAST_WORDS}  # made for this pod
WRITABLE = {"/workspace", "/tmp", "/run/pigeon"}
MEMORY = {"/dev", "/dev/shm", "/dev/mqueue", "/dev/pts", "/proc"}
LEFT_OUT = {  # from what is tried in any sandbox, and why
    "list the sandboxes' folder": "a node has none",
    "resolve a name": "allowed, see docs/kubernetes.md",
    "connect to the internet": "allowed",
    "find a writable mount without a size": "the kubelet watches over them, see the bombs",
    "find a mount that honours setuid": "no_new_privs holds for every program, see below",
    "run as root on the host": "asked differently below",
    **dict.fromkeys(
        ("read /home", "read /var/lib", "read /var/log", "read /sys", "read /boot", "read /mnt", "read /srv"),
        "the image's own, or the pod's",
    ),
    **dict.fromkeys(("socket AF_NETLINK SOCK_RAW",), "of the pod's own network, as every runtime allows it"),
}
OLD_RUNTIMES = {  # let through by containerd's default seccomp profile before 1.7 and 2.0, so by Debian 12's
    "socket AF_VSOCK SOCK_STREAM",
    "socket AF_VSOCK SOCK_SEQPACKET",
    "set up io_uring",
}
HARMLESS = {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "console"}


def connecting(target: str) -> Callable[[], object]:
    """Try to connect to one of the addresses that were given."""

    def connect() -> object:
        host, port = GIVEN["targets"][target]
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
        return f"connected to {host}:{port}"

    return connect


def mounts() -> list[tuple[str, str, set[str], str]]:
    """Where each is, what of its file system it shows, its flags and the kind."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        root, point, flags = mount.split()[3:6]
        found.append((point, root, set(flags.split(",")), source.split()[0]))
    return found


def find_a_token() -> object:
    found = [point for point, root, _, _ in mounts() if "secret" in root + point or "projected" in root]
    for folder, _, names in os.walk("/", onerror=None):
        if folder.startswith(("/proc", "/sys")):
            continue
        found += [os.path.join(folder, name) for name in names if name in ("token", "kubeconfig")]
    if found:
        return found
    raise kept_out("nowhere")


def find_a_secret() -> object:
    known = {name for pid in ("self", str(os.getppid())) for name in environment(pid)}
    if found := [name for name in known if name.startswith("PIGEON") or name.endswith(("TOKEN", "KEY", "SECRET"))]:
        return found
    raise kept_out("nothing")


def environment(pid: str) -> list[str]:
    """The names of a process's variables."""
    return [each.split("=")[0] for each in Path(f"/proc/{pid}/environ").read_text().split("\0")]


def see_a_folder() -> object:
    known = WRITABLE | MEMORY | OWN_FILES | {"/"}
    foreign = [point for point, *_ in mounts() if point not in known and not point.startswith(("/proc/", "/sys"))]
    shown = [root for point, root, *_ in mounts() if point in WRITABLE and "empty-dir" not in root and root != "/"]
    if foreign or shown:
        return foreign, shown
    raise kept_out("none")


def have_a_writable_root() -> object:
    if not os.statvfs("/").f_flag & os.ST_RDONLY:
        return "writable"
    raise kept_out("read-only")


def find_a_writable_place() -> object:
    found = []
    for folder, names, _ in os.walk("/"):
        names[:] = [name for name in names if os.path.join(folder, name) not in WRITABLE | {"/proc", "/dev"}]
        if os.access(folder, os.W_OK):
            found.append(folder)
    if found:
        return found
    raise kept_out("none")


def be_root() -> object:
    users, groups = {*os.getresuid()}, {*os.getresgid(), *os.getgroups()}
    if 0 in users | groups or len(users) > 1:
        return users, groups
    raise kept_out(f"user {users}, groups {groups}")


def find_a_device() -> object:
    found = []
    for folder, _, names in os.walk("/"):
        if folder.startswith(("/proc", "/sys", "/dev/pts")):
            continue
        for name in names:
            mode = os.lstat(os.path.join(folder, name)).st_mode
            if (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)) and (folder != "/dev" or name not in HARMLESS):
                found.append(os.path.join(folder, name))
    if found:
        return found
    raise kept_out("none")


def see_a_process() -> object:
    owners = {os.stat(f"/proc/{pid}/status").st_uid for pid in filter(str.isdigit, os.listdir("/proc")) if pid != "1"}
    lines = Path("/proc/1/status").read_text().splitlines()
    first = {int(each) for line in lines if line.startswith("Uid:") for each in line.split()[1:]}
    if foreign := (owners | first) - {os.getuid(), 0}:  # the agent's files are root's because nobody may dump it
        return foreign
    if 0 in first:
        return "the agent is root"
    raise kept_out("none")


def change_a_control_group() -> object:
    found = []
    for folder, _, names in os.walk("/sys/fs/cgroup"):
        found += [path for name in names if os.access(path := os.path.join(folder, name), os.W_OK)]
    if found:
        return found[:10]
    raise kept_out("none")


ATTEMPTS: dict[str, Callable[[], object]] = {
    **{name: each for name, each in ANYWHERE.items() if name not in LEFT_OUT},
    **{f"read {path}": reading(path) for path in (*ACCOUNTS, *SOCKETS)},
    **{f"write {path}": opening(path, os.O_WRONLY) for path in sorted(OWN_FILES - {LAST_WORDS})},
    "find a service account's token anywhere": find_a_token,
    "find a secret in the environment": find_a_secret,
    "see a folder of the host": see_a_folder,
    "have a root file system that can be written to": have_a_writable_root,
    "find another place that can be written to": find_a_writable_place,
    "be root, or one of its group": be_root,
    "find a device": find_a_device,
    "see a process of another user": see_a_process,
    "change a control group": change_a_control_group,
}
DIALLED = {f"connect to {target}": connecting(target) for target in TARGETS}


if __name__ == "__main__":
    GIVEN.update(json.loads(Path("/workspace/arguments.json").read_text()))
    results = {name: outcome(each) for name, each in ATTEMPTS.items()}
    with ThreadPoolExecutor(len(DIALLED)) as pool:  # what a firewall drops takes its time
        results.update(zip(DIALLED, pool.map(outcome, DIALLED.values()), strict=True))
    Path("/workspace/result.json").write_text(json.dumps(results))
