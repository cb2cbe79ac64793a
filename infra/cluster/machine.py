"""What the cluster changes on the machine outside its own folder, and how each change is taken back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any

from infra.cluster import policies
from infra.cluster.configuration import firewall
from infra.cluster.layout import BRIDGE, CGROUP, NODE_ADDRESS, POD_NETWORK, POLICY_TABLE, ClusterFailed

PROGRAMS = {
    "etcd": "etcd-server",
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "nft": "nftables",
    "ip": "iproute2",
    "mount": "mount",
    "unshare": "util-linux",
    "mmdebstrap": "mmdebstrap",
    "gcc": "gcc",
    "/usr/include/stdio.h": "libc6-dev",
    "buildah": "buildah",
}
POLICY = Path("/usr/sbin/policy-rc.d")
SERVICES = {"etcd-server": "etcd", "containerd": "containerd"}

CGROUPS = Path("/sys/fs/cgroup")
COMPONENTS = f"{CGROUP}/components"
CPUSET = ("cpuset.cpus", "cpuset.mems")  # a new group of cgroup v1 has neither, and takes no process without
V2_CONTROLLERS = ("cpu", "cpuset", "io", "memory", "pids")
SETTINGS = (  # what the kubelet and the CNI plugins set and nobody sets back
    *("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys"),
    *("kernel/keys/root_maxbytes", "net/ipv4/ip_forward"),
)
MAX_ALIAS = 255  # characters; IFALIASZ of linux/if.h without its final zero
BRIDGE_FILTER = Path("/proc/sys/net/bridge")
BRIDGE_FLAGS = ("nf_call_iptables", "nf_call_ip6tables")
CAP_SYS_RESOURCE = 24  # capabilities(7)
REMOVAL_SECONDS = 20.0
LOOK_SECONDS = 0.1


def install() -> None:
    """Install from Debian what is missing, without starting any of it. Raises ClusterFailed where apt cannot."""
    missing = sorted({package for program, package in PROGRAMS.items() if not _found(program)})
    if not missing:
        return
    print(f"installing {', '.join(missing)}", flush=True)  # noqa: T201
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with _no_services_started(missing):
        for words in (("update", "--quiet"), ("install", "--quiet", "--yes", "--no-install-recommends", *missing)):
            if subprocess.call(("apt-get", *words), env=environment, stdout=subprocess.DEVNULL):
                raise ClusterFailed(f"apt-get {words[0]} failed; the cluster needs {', '.join(missing)}")


def owner() -> str:
    """Whose the bridge is, by the name that was given to `connect`; "" where there is none."""
    links: list[dict[str, Any]] = json.loads(_run("ip", "-json", "link"))
    return next((str(link.get("ifalias", "nobody")) for link in links if link["ifname"] == BRIDGE), "")


def connect(name: str) -> None:
    """Make the bridge, with the node's address on it, and what its pods may reach; `name` is who asks, see `owner`."""
    _check_bridge_filter()
    try:
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "link", "set", BRIDGE, "alias", name)
        _run("ip", "address", "add", f"{NODE_ADDRESS}/{POD_NETWORK.prefixlen}", "dev", BRIDGE)
        _run(
            "ip",
            "link",
            "set",
            BRIDGE,
            "up",
            "type",
            "bridge",
            *(word for flag in BRIDGE_FLAGS for word in (flag, "1")),
        )
        _run("nft", "-f", "-", text=firewall(attached_networks()) + policies.rules([], []))
    except subprocess.CalledProcessError as error:
        raise ClusterFailed(f"cannot set up the pods' network: {error.stderr.strip()}") from error
    (Path("/proc/sys/net/ipv4/ip_forward")).write_text("1")


def _check_bridge_filter() -> None:
    """Without this module what one pod sends another passes no rule, and nobody would notice."""
    if not BRIDGE_FILTER.exists() and shutil.which("modprobe"):
        subprocess.run(("modprobe", "br_netfilter"), check=False)
    if not BRIDGE_FILTER.exists():
        raise ClusterFailed("this kernel has no br_netfilter: pods could not be kept from each other")


def disconnect() -> None:
    """Take the bridge and the rules away."""
    tables = (("nft", "delete", "table", "inet", table) for table in (CGROUP, POLICY_TABLE))
    for command in (*tables, ("ip", "link", "delete", BRIDGE)):
        with suppress(subprocess.CalledProcessError, FileNotFoundError):
            _run(*command)


def attached_networks() -> tuple[str, ...]:
    """The IPv4 networks that this machine has an address in, apart from the loopback and the pods'."""
    links: list[dict[str, Any]] = json.loads(_run("ip", "-json", "-4", "address"))
    return tuple(
        str(IPv4Interface(f"{each['local']}/{each['prefixlen']}").network)
        for link in links
        for each in link["addr_info"]
        if link["ifname"] not in ("lo", BRIDGE)
    )


def settings() -> dict[str, str]:
    """The kernel settings as they are, for `restore`."""
    return {name: (Path("/proc/sys") / name).read_text().strip() for name in SETTINGS}


def restore(values: dict[str, str]) -> None:
    """Put kernel settings back."""
    for name, value in values.items():
        with suppress(OSError):
            (Path("/proc/sys") / name).write_text(value)


def make_cgroups() -> None:
    """Make the groups of the cluster's own processes and, around them and all pods, of the cluster."""
    for root in _hierarchies():
        for group in (root / CGROUP, root / COMPONENTS):
            group.mkdir(exist_ok=True)
            for name in CPUSET if (root / CPUSET[0]).exists() else ():
                (group / name).write_text((root / name).read_text())
    if (CGROUPS / "cgroup.subtree_control").exists():
        there = (CGROUPS / "cgroup.controllers").read_text().split()
        (CGROUPS / "cgroup.subtree_control").write_text(
            " ".join(f"+{name}" for name in V2_CONTROLLERS if name in there)
        )


def enter_cgroups() -> None:
    """Move this process to the components' groups, away from a login session that may be ended as a whole."""
    for root in _hierarchies():
        (root / COMPONENTS / "cgroup.procs").write_text("0")


def remove_cgroups() -> None:
    """Take the group and all below it away once the last process has gone. Raises ClusterFailed if one stays."""
    until = time.monotonic() + REMOVAL_SECONDS
    while left := [root for root in _hierarchies() if not _removed(root / CGROUP)]:
        if time.monotonic() > until:
            raise ClusterFailed(f"control groups that still have processes: {', '.join(map(str, left))}")
        time.sleep(LOOK_SECONDS)


def snapshotter(folder: Path) -> str:
    """ "overlayfs" where the folder's file system can carry one, else "native", which copies."""
    places = [folder / name for name in ("lower", "upper", "work", "merged")]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    lower, upper, work, merged = places
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    try:
        _run("mount", "-t", "overlay", "overlay", "-o", options, str(merged))
    except subprocess.CalledProcessError:
        return "native"
    else:
        _run("umount", str(merged))
        return "overlayfs"
    finally:
        shutil.rmtree(folder)


def may_lower_oom_scores() -> bool:
    """Whether this process has CAP_SYS_RESOURCE."""
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = next(line.split()[1] for line in lines if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> CAP_SYS_RESOURCE & 1)


def _removed(group: Path) -> bool:
    """Remove the groups that are empty, deepest first; returns whether none is left."""
    for folder, _, _ in os.walk(group, topdown=False):
        with suppress(OSError):
            os.rmdir(folder)
    return not group.exists()


def _hierarchies() -> list[Path]:
    """Where control groups are made: one place on cgroup v2, one a controller on v1."""
    lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [Path(place) for _, place, kind, *_ in lines if kind in ("cgroup", "cgroup2")]


def _found(program: str) -> bool:
    return Path(program).exists() if program.startswith("/") else shutil.which(program) is not None


@contextmanager
def _no_services_started(packages: list[str]) -> Iterator[None]:
    """Debian starts a service when it installs it, and again at every boot; neither is wanted here."""
    if POLICY.exists():
        yield
    else:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
        try:
            yield
        finally:
            POLICY.unlink()
    for package, service in SERVICES.items():
        if package in packages and shutil.which("systemctl"):
            subprocess.run(("systemctl", "disable", "--quiet", service), check=False, stderr=subprocess.DEVNULL)


def _run(*command: str, text: str = "") -> str:
    return subprocess.run(command, input=text, text=True, capture_output=True, check=True).stdout
