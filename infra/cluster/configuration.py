"""What each component is told: configuration files as values, without I/O."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, collapse_addresses
from typing import Any

from infra.cluster.layout import (
    BRIDGE,
    CGROUP,
    KUBELET_PORT,
    NODE_ADDRESS,
    PAUSE_IMAGE,
    POD_NETWORK,
    PODS,
    PROCESSES,
    Layout,
)

DENIED_V4 = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
    *("192.0.0.0/24", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/3"),
)


def kubelet(layout: Layout) -> dict[str, Any]:
    """The kubelet's KubeletConfiguration. Its tests would otherwise wait minutes for evictions: these are quick."""
    pki = layout.pki
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": NODE_ADDRESS,
        "port": KUBELET_PORT,
        "healthzPort": 0,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(pki / "kubelet.crt"),
        "tlsPrivateKeyFile": str(pki / "kubelet.key"),
        "containerRuntimeEndpoint": f"unix://{layout.containerd_socket}",
        "resolvConf": str(layout.config / "resolv.conf"),
        "volumePluginDir": str(layout.node / "volume-plugins"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{CGROUP}",
        "failCgroupV1": False,
        "makeIPTablesUtilChains": False,  # for kube-proxy, which is not here; they would stay behind
        "failSwapOn": False,
        "oomScoreAdj": 0,  # lowering it takes CAP_SYS_RESOURCE, which root in a virtual machine or container may lack
        "maxPods": PODS,
        "podPidsLimit": PROCESSES,
        "serializeImagePulls": False,
        "imageGCHighThresholdPercent": 100,  # never: an image that came from no registry cannot be pulled again
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "2%", "imagefs.available": "2%"},
        "evictionPressureTransitionPeriod": "30s",
        "volumeStatsAggPeriod": "5s",
    }


def containerd(layout: Layout, *, snapshotter: str, restrict_oom: bool) -> str:
    """containerd's config.toml. `restrict_oom` where this root may not lower anybody's OOM score."""
    cri = '[plugins."io.containerd.grpc.v1.cri"'
    return f"""version = 2
root = "{layout.node / "containerd"}"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "{layout.containerd_socket}"
{cri}]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = {str(restrict_oom).lower()}
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
{cri}.containerd]
  snapshotter = "{snapshotter}"
  default_runtime_name = "runc"
{cri}.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
{cri}.containerd.runtimes.runc.options]
  SystemdCgroup = false
{cri}.cni]
  bin_dir = "/usr/lib/cni"
  conf_dir = "{layout.config / "cni"}"
"""


def network(layout: Layout) -> dict[str, Any]:
    """The CNI list: one bridge, addresses from the pod network; nftables masquerades (see `firewall`)."""
    return {
        "cniVersion": "0.4.0",
        "name": "pigeon",
        "plugins": [
            {
                "type": "bridge",
                "bridge": BRIDGE,
                "isGateway": True,
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(layout.node / "addresses"),
                    "ranges": [[{"subnet": str(POD_NETWORK), "gateway": NODE_ADDRESS}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
        ],
    }


def disjoint(networks: Iterable[str]) -> list[str]:
    """The same addresses in networks that do not overlap: nft refuses a set of others."""
    return [str(network) for network in collapse_addresses(IPv4Network(network) for network in networks)]


def firewall(attached: tuple[str, ...]) -> str:
    """The nftables rules that hold for every pod, whatever NetworkPolicy says.

    A pod may answer whoever calls it and reach public IPv4 addresses; not the node (so no kubelet, no API server),
    no other pod, no private or link-local range (so no metadata server), and none of `attached`, the IPv4 networks
    that this machine is a member of. Frames between two ports of the bridge pass the forward chain by br_netfilter.
    """
    denied = ", ".join(disjoint((*DENIED_V4, *attached)))
    return f"""table inet {CGROUP} {{
  set denied {{ type ipv4_addr; flags interval; elements = {{ {denied} }}; }}
  chain input {{
    type filter hook input priority filter; policy accept;
    iifname "{BRIDGE}" ct state established,related accept
    iifname "{BRIDGE}" counter drop
    iifname != "lo" ip daddr {POD_NETWORK} counter drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    ct state established,related accept
    oifname "{BRIDGE}" counter drop
    iifname "{BRIDGE}" ip daddr @denied counter drop
    iifname "{BRIDGE}" meta nfproto ipv6 counter drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {POD_NETWORK} oifname != "{BRIDGE}" masquerade
  }}
}}
"""
