"""The components: how each is started, and when it counts as up."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from infra.cluster.api import Api
from infra.cluster.layout import (
    API_ADDRESS,
    API_PORT,
    ETCD_PEER_PORT,
    ETCD_PORT,
    KUBELET_PORT,
    NODE,
    NODE_ADDRESS,
    ROOT,
    SERVICE_NETWORK,
    Layout,
)

# Debian's etcd 3.4.23 cannot be asked for a watch's progress (3.4.25 can): these would wait for it in vain
ETCD_GATES = "SizeBasedListCostEstimate=false,WatchList=false"


@dataclass(frozen=True, slots=True)
class Part:
    """One component: its log is NAME.log. `is_up` may raise OSError for no."""

    name: str
    command: tuple[str, ...]
    is_up: Callable[[], bool]


def parts(layout: Layout, kube: Path) -> list[Part]:
    """Every component in the order of their starts, each waiting for the one before."""
    api = Api(layout)
    return [
        Part("etcd", etcd(layout), lambda: _listens(ETCD_PORT)),
        Part("containerd", containerd(layout), lambda: _listens_at(layout.containerd_socket)),
        Part("kube-apiserver", apiserver(layout, kube), lambda: api.text("/readyz") == "ok"),
        Part("kube-controller-manager", controllers(layout, kube), lambda: api.exists(DEFAULT_ACCOUNT)),
        Part("kube-scheduler", scheduler(layout, kube), lambda: True),
        Part("network-policies", network_policies(layout), lambda: True),
        Part("kubelet", kubelet(layout, kube), lambda: node_is_ready(api)),
    ]


DEFAULT_ACCOUNT = "/api/v1/namespaces/default/serviceaccounts/default"


def node_is_ready(api: Api) -> bool:
    """Whether a pod could run: the node says Ready, and the controllers have taken its first taint away."""
    if not api.exists(f"/api/v1/nodes/{NODE}"):
        return False
    node = api.json(f"/api/v1/nodes/{NODE}")
    ready = {"type": "Ready", "status": "True"}
    says = any(ready.items() <= condition.items() for condition in node["status"].get("conditions", []))
    return says and not node["spec"].get("taints")


def etcd(layout: Layout) -> tuple[str, ...]:
    """Debian's etcd, on the loopback, for holders of a certificate of its own authority."""
    client, peer = f"https://{API_ADDRESS}:{ETCD_PORT}", f"https://{API_ADDRESS}:{ETCD_PEER_PORT}"
    return _command(
        "etcd",
        name=NODE,
        data_dir=layout.node / "etcd",
        listen_client_urls=client,
        advertise_client_urls=client,
        listen_peer_urls=peer,
        initial_advertise_peer_urls=peer,
        initial_cluster=f"{NODE}={peer}",
        **_mutual_tls(layout),
        **{f"peer_{name}": value for name, value in _mutual_tls(layout).items()},
    )


def _mutual_tls(layout: Layout) -> dict[str, object]:
    pki = layout.pki
    return {
        "client_cert_auth": "true",
        "trusted_ca_file": pki / "etcd-ca.crt",
        "cert_file": pki / "etcd.crt",
        "key_file": pki / "etcd.key",
    }


def containerd(layout: Layout) -> tuple[str, ...]:
    """Debian's containerd."""
    return _command("containerd", config=layout.config / "containerd.toml")


def apiserver(layout: Layout, kube: Path) -> tuple[str, ...]:
    """The API server: Node and RBAC authorization, and the default admission plugins, among them PodSecurity."""
    pki = layout.pki
    return _command(
        str(kube),
        "kube-apiserver",
        bind_address=API_ADDRESS,
        secure_port=API_PORT,
        advertise_address=NODE_ADDRESS,
        endpoint_reconciler_type="none",
        service_cluster_ip_range=SERVICE_NETWORK,
        allow_privileged="false",
        anonymous_auth="false",
        authorization_mode="Node,RBAC",
        enable_admission_plugins="NodeRestriction",
        client_ca_file=pki / "ca.crt",
        tls_cert_file=pki / "apiserver.crt",
        tls_private_key_file=pki / "apiserver.key",
        etcd_servers=f"https://{API_ADDRESS}:{ETCD_PORT}",
        etcd_cafile=pki / "etcd-ca.crt",
        etcd_certfile=pki / "apiserver-etcd.crt",
        etcd_keyfile=pki / "apiserver-etcd.key",
        kubelet_certificate_authority=pki / "ca.crt",
        kubelet_client_certificate=pki / "apiserver-kubelet.crt",
        kubelet_client_key=pki / "apiserver-kubelet.key",
        kubelet_preferred_address_types="InternalIP",
        service_account_issuer="https://kubernetes.default.svc",
        service_account_key_file=pki / "service-account.pub",
        service_account_signing_key_file=pki / "service-account.key",
        feature_gates=ETCD_GATES,
        profiling="false",
    )


def controllers(layout: Layout, kube: Path) -> tuple[str, ...]:
    """The controller manager, alone and so without an election or a port."""
    return _command(
        str(kube),
        "kube-controller-manager",
        kubeconfig=layout.pki / "controller-manager.kubeconfig",
        leader_elect="false",
        secure_port=0,
        root_ca_file=layout.pki / "ca.crt",
        service_account_private_key_file=layout.pki / "service-account.key",
        use_service_account_credentials="true",  # each controller by its own role
        profiling="false",
    )


def scheduler(layout: Layout, kube: Path) -> tuple[str, ...]:
    """The scheduler, alone and so without an election or a port."""
    return _command(
        str(kube),
        "kube-scheduler",
        kubeconfig=layout.pki / "scheduler.kubeconfig",
        leader_elect="false",
        secure_port=0,
    )


def network_policies(layout: Layout) -> tuple[str, ...]:
    """Our own, since Debian has none: infra/cluster/policies.py."""
    return ("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "infra.cluster.policies", str(layout.state))


def kubelet(layout: Layout, kube: Path) -> tuple[str, ...]:
    """The kubelet; what is not below is in its configuration file."""
    return _command(
        str(kube),
        "kubelet",
        config=layout.config / "kubelet.json",
        kubeconfig=layout.pki / "kubelet.kubeconfig",
        root_dir=layout.node / "kubelet",
        hostname_override=NODE,
        node_ip=NODE_ADDRESS,
    )


def ports() -> tuple[tuple[str, int], ...]:
    """What has to be free before a start: host and port."""
    return tuple((API_ADDRESS, port) for port in (API_PORT, ETCD_PORT, ETCD_PEER_PORT, KUBELET_PORT))


def _command(*words: str, **options: object) -> tuple[str, ...]:
    return (*words, *(f"--{name.replace('_', '-')}={value}" for name, value in options.items()))


def _listens(port: int) -> bool:
    with socket.create_connection((API_ADDRESS, port), timeout=1):
        return True


def _listens_at(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        return True
