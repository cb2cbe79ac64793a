"""Where the cluster is: its files, addresses, ports and names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

SOURCE = Path(__file__).parent
ROOT = SOURCE.parents[1]
NODE = "pigeon-node"
BRIDGE = "pigeon0"
POD_NETWORK = IPv4Network("10.211.0.0/22")
SERVICE_NETWORK = IPv4Network("10.212.0.0/24")
NODE_ADDRESS = str(POD_NETWORK[1])  # the bridge's: a kubelet may not be on the loopback, and this is on no other wire
API_ADDRESS = "127.0.0.1"
API_PORT = 16443
ETCD_PORT = 12379
ETCD_PEER_PORT = 12380
KUBELET_PORT = 10250
CGROUP = "pigeon"  # every process of the cluster is in a control group below this one
POLICY_TABLE = "pigeon-policies"  # of nftables, beside the one that is named as the control groups are
PODS = 250  # the most on this node at once
PROCESSES = 256  # of one pod

PAUSE_IMAGE = "localhost/pigeon/pause:1"
TERMINAL_IMAGES = tuple(
    f"docker.io/pigeon/python-terminal:{tag}" for tag in ("latest", "dev")
)  # a bare name's registry

MAX_SOCKET_PATH = 107  # bytes; sun_path of unix(7) without its final zero
HIDDEN = ("/run", "/var/lib", "/var/log")  # the node has its own; state below one of these would vanish with it


class ClusterFailed(Exception):
    """The cluster cannot be built or started here; the message says why and what to do about it."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of one cluster, all below `state`, an absolute path."""

    state: Path

    def __post_init__(self) -> None:
        if any(self.state.is_relative_to(place) for place in HIDDEN):
            raise ClusterFailed(f"the state cannot be in {self.state}: the node has its own {', '.join(HIDDEN)}")
        if len(os.fsencode(self.containerd_socket)) > MAX_SOCKET_PATH:
            raise ClusterFailed(f"{self.containerd_socket} is too long for a socket: choose a shorter --state")

    @property
    def kubeconfig(self) -> Path:
        """The administrator's, mode 0600."""
        return self.state / "kubeconfig"

    @property
    def pki(self) -> Path:
        """Keys, certificates and the components' own kubeconfigs."""
        return self.state / "pki"

    @property
    def config(self) -> Path:
        """What the components read at their start."""
        return self.state / "config"

    @property
    def logs(self) -> Path:
        """One file a component. The only thing that `down` leaves."""
        return self.state / "logs"

    @property
    def node(self) -> Path:
        """The node's own /run, /var/lib and /var/log, etcd's data, the images and the kubelet's files."""
        return self.state / "node"

    @property
    def images(self) -> Path:
        """Archives to import at the start."""
        return self.node / "images"

    @property
    def containerd_socket(self) -> Path:
        """For `ctr --address`."""
        return self.state / "containerd.sock"

    @property
    def ready(self) -> Path:
        """Exists once everything is up: the seconds each step took, as JSON."""
        return self.state / "ready.json"

    @property
    def running(self) -> Path:
        """Which process the node is and what to restore after it, as JSON."""
        return self.state / "running.json"


def cache_folder() -> Path:
    """What is built once for all clusters of this user: the binary and the root file system of the terminal image."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pigeon" / "cluster"
