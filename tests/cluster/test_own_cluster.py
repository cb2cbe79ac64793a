"""The cluster this repository brings up itself, as far as it can be looked at without being root."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import io
import ipaddress
import json
import marshal
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import IO, Any

import pytest
from cryptography import x509

from infra.cluster import build, certificates, configuration, images, lifecycle, parts, policies
from infra.cluster.layout import API_ADDRESS, NODE, NODE_ADDRESS, POD_NETWORK, SOURCE, ClusterFailed, Layout
from infra.cluster.lifecycle import Running
from tests.waiting import until

KUBE = Path("/cache/kube")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "cluster")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A cluster's folder with all its certificates."""
    layout = Layout(tmp_path_factory.mktemp("cluster"))
    certificates.write_all(layout)
    return layout


class TestModules:
    """infra/cluster/go.mod"""

    def test_every_staging_module_is_of_the_release_that_is_pinned(self) -> None:
        """Kubernetes is one release in thirty modules; a mixture of two compiles, and fails at night."""
        release = build.kubernetes_version().removeprefix("v1.")
        replaced = re.findall(r"^\t(k8s\.io/\S+) => \1 v0\.(\S+)$", (SOURCE / "go.mod").read_text(), re.MULTILINE)
        assert len(replaced) > 20
        assert {version for _, version in replaced} == {release}

    def test_the_release_runs_on_cgroup_v1_and_on_debians_containerd(self) -> None:
        """From 1.35 a kubelet wants cgroup v2, and soon after containerd 2."""
        _, minor, _ = build.kubernetes_version().split(".")
        assert 31 <= int(minor) <= 34

    def test_every_module_that_is_required_has_its_checksum_committed(self) -> None:
        """Nothing is compiled whose content was not seen before."""
        sums = (SOURCE / "go.sum").read_text()
        required = re.findall(r"^\t(\S+) v\d\S* // indirect$", (SOURCE / "go.mod").read_text(), re.MULTILINE)
        missing = [module for module in required if f"{module} v" not in sums]
        assert required
        assert not missing


class TestCache:
    """What is built once."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        return tmp_path / "pigeon" / "cluster"

    @pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
    def test_a_program_is_compiled_once_and_outside_the_tree(self, cache: Path) -> None:
        """The second start of a cluster takes seconds."""
        program = build.pause_binary()
        before = program.stat().st_ino
        assert program.is_relative_to(cache)
        assert build.pause_binary().stat().st_ino == before

    def test_a_build_that_fails_leaves_nothing_that_looks_built(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A half-linked binary in the cache would be run at every later start."""
        monkeypatch.setenv("PATH", "")
        with pytest.raises(ClusterFailed, match="takes Go"):
            build.kube_binary()
        assert not list(cache.rglob("kube"))

    @pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
    async def test_the_pause_program_ends_when_it_is_told_to(self) -> None:
        """Else every pod takes its whole grace period to go."""
        pause = await asyncio.create_subprocess_exec(build.pause_binary())

        async def would_notice() -> bool:
            return catches(pause.pid, signal.SIGTERM)

        await until(would_notice, "it would notice")
        pause.terminate()
        async with asyncio.timeout(30):
            assert await pause.wait() == 0


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for this signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


class TestCertificates:
    """infra/cluster/certificates.py"""

    @pytest.mark.parametrize(
        ("authority", "server", "host"),
        [("ca", "apiserver", API_ADDRESS), ("ca", "kubelet", NODE_ADDRESS), ("etcd-ca", "etcd", API_ADDRESS)],
    )
    def test_servers_and_their_clients_believe_each_other(
        self, made: Layout, authority: str, server: str, host: str
    ) -> None:
        """Every connection inside the cluster is authenticated both ways."""
        client = {"apiserver": "kubelet", "kubelet": "apiserver-kubelet", "etcd": "apiserver-etcd"}[server]
        greet(made, server=(authority, server), client=(authority, client), host=host)

    def test_a_certificate_of_the_cluster_does_not_open_its_database(self, made: Layout) -> None:
        """Whoever reads etcd reads every secret, whatever RBAC says."""
        with pytest.raises(ssl.SSLError):
            greet(made, server=("etcd-ca", "etcd"), client=("ca", "apiserver-kubelet"), host=API_ADDRESS)

    def test_a_server_is_no_other_host(self, made: Layout) -> None:
        """A kubelet cannot pass for the API server."""
        with pytest.raises(ssl.SSLCertVerificationError):
            greet(made, server=("ca", "kubelet"), client=("ca", "apiserver"), host=API_ADDRESS)

    def test_the_kubelet_is_the_user_that_node_authorization_knows(self, made: Layout) -> None:
        """It then reads the secrets of its own pods only."""
        subject = certificate(made, "kubelet").subject.rfc4514_string()
        assert subject == f"CN=system:node:{NODE},O=system:nodes"

    def test_they_are_good_for_a_year_but_not_for_more(self, made: Layout) -> None:
        """A cluster that is thrown away needs no renewal."""
        found = certificate(made, "apiserver")
        assert (
            datetime.timedelta(364) < found.not_valid_after_utc - found.not_valid_before_utc < datetime.timedelta(367)
        )

    def test_keys_and_kubeconfigs_are_the_owners_alone(self, made: Layout) -> None:
        """The administrator's kubeconfig is root on this machine."""
        private = [made.kubeconfig, *made.pki.glob("*.key"), *made.pki.glob("*.kubeconfig")]
        assert len(private) > 10
        assert {path.stat().st_mode & 0o777 for path in private} == {0o600}

    def test_the_kubeconfig_needs_no_other_file(self, made: Layout) -> None:
        """It can be copied, and a test can derive another one from it."""
        found = json.loads(made.kubeconfig.read_text())
        assert all(name.endswith("-data") for name in found["users"][0]["user"])
        assert set(found["clusters"][0]["cluster"]) == {"server", "certificate-authority-data"}


def certificate(layout: Layout, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((layout.pki / f"{name}.crt").read_bytes())


def greet(layout: Layout, *, server: tuple[str, str], client: tuple[str, str], host: str) -> None:
    """A TLS handshake in memory, each side proving itself by (authority, name). Raises SSLError if one objects."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    listening = context(layout, *server, ssl.PROTOCOL_TLS_SERVER).wrap_bio(to_server, to_client, server_side=True)
    calling = context(layout, *client, ssl.PROTOCOL_TLS_CLIENT).wrap_bio(to_client, to_server, server_hostname=host)
    for _ in range(4):
        for side in (calling, listening):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    listening.write(b"hello")
    assert calling.read(5) == b"hello"


def context(layout: Layout, authority: str, name: str, protocol: int) -> ssl.SSLContext:
    made = ssl.SSLContext(protocol)
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(layout.pki / f"{authority}.crt")
    made.load_cert_chain(layout.pki / f"{name}.crt", layout.pki / f"{name}.key")
    return made


class TestParts:
    """What the components are told."""

    def test_nothing_listens_where_another_machine_could_call(self, layout: Layout) -> None:
        """Only the kubelet is not on the loopback, where it may not be: it is on the bridge."""
        flags = " ".join(word for part in parts.parts(layout, KUBE) for word in part.command)
        addresses = set(re.findall(r"(?:https?://|bind-address=)(\d+\.\d+\.\d+\.\d+)", flags))
        assert addresses == {API_ADDRESS}
        assert flags.count("--secure-port=0") == 2
        assert configuration.kubelet(layout)["address"] == NODE_ADDRESS

    def test_the_api_server_asks_everybody_who_they_are(self, layout: Layout) -> None:
        """RBAC and Pod Security are what the tests on this cluster are about."""
        flags = parts.apiserver(layout, KUBE)
        assert {"--anonymous-auth=false", "--authorization-mode=Node,RBAC", "--allow-privileged=false"} <= set(flags)
        assert not [flag for flag in flags if flag.startswith("--disable-admission-plugins")]

    def test_pods_cannot_reach_the_kubelet_without_a_certificate_either(self, layout: Layout) -> None:
        """The firewall is not the only thing between a session and its node."""
        found = configuration.kubelet(layout)
        assert found["authentication"]["anonymous"] == {"enabled": False}
        assert found["authorization"] == {"mode": "Webhook"}

    @pytest.mark.parametrize("restrict", [True, False])
    def test_containerd_reads_its_configuration(self, layout: Layout, restrict: bool) -> None:
        """It is TOML, and says which of Debian's runtimes and which snapshotter."""
        text = configuration.containerd(layout, snapshotter="native", restrict_oom=restrict)
        cri = tomllib.loads(text)["plugins"]["io.containerd.grpc.v1.cri"]
        assert cri["containerd"]["snapshotter"] == "native"
        assert cri["restrict_oom_score_adj"] is restrict
        assert cri["containerd"]["runtimes"]["runc"]["options"] == {"SystemdCgroup": False}

    @pytest.mark.parametrize("state", ["/run/cluster", "/var/lib/cluster"])
    def test_a_folder_that_the_node_would_hide_is_refused(self, state: str) -> None:
        """The node has its own /run and /var/lib, and would not find its files."""
        with pytest.raises(ClusterFailed, match="cannot be in"):
            Layout(Path(state))

    def test_a_folder_too_deep_for_a_socket_is_refused(self, tmp_path: Path) -> None:
        """The kernel's own message would be "invalid argument"."""
        with pytest.raises(ClusterFailed, match="shorter --state"):
            Layout(tmp_path / ("x" * 100))


class TestFirewall:
    """What stands in for NetworkPolicy."""

    @pytest.mark.parametrize(
        "address",
        ["10.0.0.1", "169.254.169.254", "192.168.1.1", "100.64.0.1", "172.31.0.1", str(POD_NETWORK[9]), "203.0.113.7"],
    )
    def test_a_pod_reaches_no_private_address_and_no_neighbour_of_the_machine(self, address: str) -> None:
        """Metadata servers, other pods, the office's printers."""
        assert any(ipaddress.ip_address(address) in network for network in denied(("203.0.113.0/24",)))

    @pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "203.0.113.7"])
    def test_a_pod_reaches_public_addresses(self, address: str) -> None:
        """As the deployed NetworkPolicy may allow."""
        assert not any(ipaddress.ip_address(address) in network for network in denied(("192.168.7.0/24",)))

    def test_networks_that_overlap_are_merged(self) -> None:
        """nft refuses a set with overlapping intervals, and with it all other rules."""
        found = denied(("10.211.0.0/16", "192.168.1.0/24"))
        assert not [(one, other) for one in found for other in found if one is not other and one.overlaps(other)]


def denied(attached: tuple[str, ...]) -> list[ipaddress.IPv4Network]:
    """The networks that the rules deny on a machine with these."""
    found = re.search(r"elements = { (.*?) }", configuration.firewall(attached))
    assert found
    return [ipaddress.IPv4Network(network) for network in found[1].split(", ")]


class TestPolicies:
    """infra/cluster/policies.py"""

    def test_a_pod_that_is_not_known_reaches_nothing(self) -> None:
        """Between its first process and the first look at it there is no open moment."""
        assert ways(policies.rules([], [])) == {}
        assert "    drop\n  }" in policies.rules([], [])

    def test_a_pod_without_a_policy_is_not_restricted(self) -> None:
        """As Kubernetes has it; an ingress policy says nothing of egress."""
        ingress = policy({}, policyTypes=["Ingress"])
        assert ways(policies.rules([pod("10.211.0.5")], [ingress])) == {"10.211.0.5": "accept"}

    def test_policies_of_a_pod_add_up_and_those_of_others_do_not(self) -> None:
        """Namespace and labels decide."""
        open_web = policy({}, egress=[{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": [{"port": 443}]}])
        open_dns = policy({"matchLabels": {"dns": "yes"}}, egress=[{"ports": [{"port": 53, "protocol": "UDP"}]}])
        elsewhere = policy({}, namespace="elsewhere", egress=[{}])
        script = policies.rules([pod("10.211.0.5"), pod("10.211.0.6", dns="yes")], [open_web, open_dns, elsewhere])
        assert allowed(script, "10.211.0.5") == ["ip daddr 0.0.0.0/0 tcp dport 443"]
        assert allowed(script, "10.211.0.6") == ["ip daddr 0.0.0.0/0 tcp dport 443", "ip daddr 0.0.0.0/0 udp dport 53"]

    def test_deny_all_is_an_egress_policy_without_a_rule(self) -> None:
        """What the sandboxes' namespace starts from."""
        script = policies.rules([pod("10.211.0.5")], [policy({}, policyTypes=["Ingress", "Egress"])])
        assert allowed(script, "10.211.0.5") == []

    def test_exceptions_that_overlap_are_merged_and_ranges_of_ports_kept(self) -> None:
        """nft refuses the first."""
        block = {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8", "10.1.0.0/16"]}
        rule = {"to": [{"ipBlock": block}], "ports": [{"port": 80, "endPort": 90}]}
        script = policies.rules([pod("10.211.0.5")], [policy({}, egress=[rule])])
        assert allowed(script, "10.211.0.5") == ["ip daddr 0.0.0.0/0 ip daddr != { 10.0.0.0/8 } tcp dport 80-90"]

    @pytest.mark.parametrize(
        "rule",
        [
            {"to": [{"podSelector": {}}]},
            {"to": [{"ipBlock": {"cidr": "::/0"}}]},
            {"ports": [{"port": "web"}]},
        ],
    )
    def test_what_cannot_be_reached_here_is_not_opened_by_mistake(self, rule: dict[str, Any]) -> None:
        """A rule that matches nothing must not become one that matches everything."""
        assert allowed(policies.rules([pod("10.211.0.5")], [policy({}, egress=[rule])]), "10.211.0.5") == []

    @pytest.mark.parametrize(
        ("operator", "values", "matches"),
        [
            ("In", ["a"], True),
            ("In", ["b"], False),
            ("NotIn", ["a"], False),
            ("Exists", [], True),
            ("DoesNotExist", [], False),
        ],
    )
    def test_selectors_match_as_kubernetes_does(self, operator: str, values: list[str], matches: bool) -> None:
        """All four operators."""
        selector = {"matchExpressions": [{"key": "k", "operator": operator, "values": values}]}
        assert policies.selects(selector, {"k": "a"}) is matches

    @pytest.mark.skipif(os.geteuid() != 0 or shutil.which("nft") is None, reason="nft checks for root only")
    def test_nft_understands_the_rules(self) -> None:
        """It checks and changes nothing."""
        rule = {"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}}], "ports": [{"port": 443}]}
        scripts = (
            configuration.firewall(("203.0.113.0/24",)),
            policies.rules([pod("10.211.0.5")], [policy({}, egress=[rule])]),
        )
        for script in scripts:
            unused = script.replace("table inet pigeon", "table inet pigeon-unused")
            subprocess.run(("nft", "--check", "--file", "-"), input=unused, text=True, check=True)


def pod(address: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"namespace": "ours", "labels": labels}, "status": {"phase": "Running", "podIP": address}}


def policy(selector: dict[str, Any], namespace: str = "ours", **spec: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": namespace}, "spec": {"podSelector": selector, **spec}}


def ways(script: str) -> dict[str, str]:
    """What becomes of the packets of each known pod."""
    return dict(re.findall(r"(\d+\.\d+\.\d+\.\d+) : ([a-z0-9-]+(?: [a-z0-9-]+)?)", script))


def allowed(script: str, address: str) -> list[str]:
    """The matches that a restricted pod's packets are accepted by."""
    name = ways(script)[address].removeprefix("jump ")
    body = script.partition(f"chain {name} {{\n")[2].partition("  }\n")[0].splitlines()
    assert body[-1].strip() == "drop"
    return [line.strip().removesuffix(" accept") for line in body[:-1]]


class TestImages:
    """infra/cluster/images.py"""

    @pytest.fixture
    def root_filesystem(self, tmp_path: Path) -> Path:
        """As much of one as the terminal image builds upon."""
        (tmp_path / "etc").mkdir()
        for name in ("passwd", "group"):
            (tmp_path / "etc" / name).write_text("root:x:0:0::/root:/bin/sh\n")
        archive = tmp_path / "rootfs.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(tmp_path / "etc", "./etc")
        return archive

    def test_the_archive_is_what_the_digests_in_it_say(self, tmp_path: Path, root_filesystem: Path) -> None:
        """containerd checks every one of them."""
        images.terminal(("localhost/a:1", "localhost/b:1"), root_filesystem).write(tmp_path / "image.tar")
        blobs = read_blobs(tmp_path / "image.tar")
        assert all(hashlib.sha256(data).hexdigest() == digest for digest, data in blobs.items())

    def test_it_has_every_name_and_the_agent_of_this_tree(self, tmp_path: Path, root_filesystem: Path) -> None:
        """Whoever changes the agent tests the changed one."""
        images.terminal(("localhost/a:1", "localhost/b:1"), root_filesystem).write(tmp_path / "image.tar")
        with tarfile.open(tmp_path / "image.tar") as tar:
            index = json.load(extracted(tar, "index.json"))
        assert [each["annotations"]["io.containerd.image.name"] for each in index["manifests"]] == [
            "localhost/a:1",
            "localhost/b:1",
        ]
        top = top_layer(tmp_path / "image.tar", index)
        assert extracted(top, images.AGENT).read() == images.AGENT_SOURCE.read_bytes()
        if sys.version_info[:2] == (3, 11):
            compiled = marshal.loads(extracted(top, images.COMPILED).read()[16:])  # after the header of PEP 552
            assert compiled.co_filename == f"/{images.AGENT}"
        assert extracted(top, "etc/passwd").read().startswith(b"root:")
        assert top.getmember("workspace").uid == images.USER


def read_blobs(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        names = [name for name in tar.getnames() if name.startswith("blobs/sha256/")]
        return {name.rpartition("/")[2]: extracted(tar, name).read() for name in names}


def top_layer(archive: Path, index: dict[str, Any]) -> tarfile.TarFile:
    blobs = read_blobs(archive)
    manifest = json.loads(blobs[index["manifests"][0]["digest"].removeprefix("sha256:")])
    return tarfile.open(fileobj=io.BytesIO(blobs[manifest["layers"][-1]["digest"].removeprefix("sha256:")]))


def extracted(tar: tarfile.TarFile, name: str) -> IO[bytes]:
    file = tar.extractfile(name)
    assert file
    return file


class TestRunning:
    """Which process the node is."""

    async def test_a_process_that_was_given_an_old_id_is_not_taken_for_the_node(self) -> None:
        """`down` kills it, as root."""
        child = await asyncio.create_subprocess_exec("sleep", "60")
        try:
            assert Running({}, pid=child.pid, started=lifecycle.start_time(child.pid)).alive
            assert not Running({}, pid=child.pid, started="1").alive
        finally:
            child.kill()
            await child.wait()

    async def test_one_that_has_ended_is_not_alive(self) -> None:
        """Nor is a zombie, which nobody may have waited for."""
        child = await asyncio.create_subprocess_exec("sleep", "60")
        running = Running({}, pid=child.pid, started=lifecycle.start_time(child.pid))
        child.kill()
        await child.wait()
        assert not running.alive

    def test_without_a_cluster_there_is_none_ready(self, layout: Layout) -> None:
        """`status` says so, without a stack trace."""
        assert not lifecycle.is_ready(layout)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may")
    def test_who_is_not_root_is_told_so_at_once(self, layout: Layout) -> None:
        """And not after a compilation of many minutes."""
        with pytest.raises(ClusterFailed, match="as root"):
            lifecycle.up(layout)
