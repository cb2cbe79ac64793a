"""What a session can reach, computed from the policies: an address is reachable if any rule allows it."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network

import pytest

from tests.infra.manifests import SANDBOXES, SYSTEM, Build, Object, build, every_build

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Network = IPv4Network | IPv6Network

DENIED = [
    *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16", "fc00::/7", "fe80::/10"),
    "34.118.224.0/20",  # GKE's default range of services
    *("240.0.0.0/4", "198.18.0.0/15", "192.0.0.0/24", "127.0.0.0/8", "0.0.0.0/8", "224.0.0.0/4"),
    *("::1/128", "::ffff:0:0/96", "64:ff9b::/96", "2000::/3"),
]
METADATA = ip_network("169.254.169.254/32")
RESOLVER_CACHE = ip_network("169.254.20.10/32")


def policies(each: Build, namespace: str) -> list[Object]:
    """The policies of a namespace that hold for all of its pods."""
    return [policy for policy in each.of("NetworkPolicy", namespace) if policy["spec"]["podSelector"] == {}]


def blocks(each: Build, port: int) -> list[Object]:
    """The address blocks that sessions may reach on this port."""
    rules = [rule for policy in policies(each, SANDBOXES) for rule in policy["spec"].get("egress", [])]
    assert all(rule.get("to") and rule.get("ports") for rule in rules), "a rule without addresses or ports allows all"
    return [
        peer["ipBlock"]
        for rule in rules
        if any(port in range(each["port"], each.get("endPort", each["port"]) + 1) for each in rule["ports"])
        for peer in rule["to"]
        if "ipBlock" in peer
    ]


def reachable(network: Network, allowed: list[Object]) -> list[Network]:
    """What of the network these blocks leave open."""
    opened: list[Network] = []
    for block in allowed:
        part = _common(network, ip_network(block["cidr"]))
        opened += _without([part] if part else [], [ip_network(text) for text in block.get("except", [])])
    return opened


def _common(one: Network, other: Network) -> Network | None:
    if one.version != other.version or not one.overlaps(other):
        return None
    return max(one, other, key=lambda network: network.prefixlen)


def _without(opened: list[Network], closed: list[Network]) -> list[Network]:
    for hole in closed:
        left: list[Network] = []
        for network in opened:
            part = _common(network, hole)
            if part is None:
                left.append(network)
            elif part == hole and part != network:
                left += network.address_exclude(part)  # type: ignore[arg-type]
        opened = left
    return opened


def test_the_computation_knows_what_is_left() -> None:
    """A hole is closed, its neighbours are open; a hole around everything leaves nothing."""
    block = {"cidr": "10.0.0.0/30", "except": ["10.0.0.1/32"]}
    left = reachable(ip_network("10.0.0.0/8"), [block])
    assert sorted(map(str, left)) == ["10.0.0.0/32", "10.0.0.2/31"]
    assert reachable(ip_network("10.0.0.1/32"), [block]) == []
    assert reachable(ip_network("10.0.0.0/31"), [{"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}]) == []
    assert reachable(ip_network("fe80::/10"), [block]) == []


def test_without_a_rule_sessions_have_no_network() -> None:
    """Every build denies first, in both directions."""
    for each in every_build():
        deny = each.one("NetworkPolicy", "deny-all", SANDBOXES)["spec"]
        assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
        assert not any("ingress" in policy["spec"] for policy in each.of("NetworkPolicy"))
        if not each.has("network-policy"):
            assert len(each.of("NetworkPolicy", SANDBOXES)) == 1


@pytest.mark.parametrize("port", [22, 80, 443, 988, 6443, 10250])
@pytest.mark.parametrize("denied", DENIED)
def test_no_private_address_is_reachable(denied: str, port: int) -> None:
    """Neighbours, nodes, services, the API server, the metadata server: no rule leaves an address of them open."""
    for each in every_build():
        assert reachable(ip_network(denied), blocks(each, port)) == [], each.name


def test_packages_can_be_installed() -> None:
    """The public internet is open over HTTPS, and over nothing else."""
    for each in (build("production"), build("dev"), build("base+network-policy")):
        public = ip_network("151.101.0.0/16")
        assert reachable(public, blocks(each, 443)) == [public]
        assert [reachable(public, blocks(each, port)) for port in (22, 25, 80, 8080)] == [[], [], [], []]


def test_names_are_resolved_by_the_clusters_resolvers_only() -> None:
    """By the node's cache, which gVisor needs a rule by address for, and by pods of kube-system; never by metadata."""
    for each in every_build():
        if not each.has("network-policy"):
            continue
        assert blocks(each, 53) == [{"cidr": str(RESOLVER_CACHE)}]
        assert reachable(METADATA, blocks(each, 53)) == []
        (rule,) = each.one("NetworkPolicy", "names", SANDBOXES)["spec"]["egress"]
        (peer,) = (peer for peer in rule["to"] if "ipBlock" not in peer)
        assert peer["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}
        assert peer["podSelector"]["matchExpressions"][0]["key"] == "k8s-app"
        assert each.settings.kube.nameservers in (("169.254.20.10",), ("10.96.0.10",))


def test_the_control_plane_is_closed_in_production() -> None:
    """Also where the API server has a public address, which deployment.env names."""
    production = build("production")
    control_plane = ip_network("203.0.113.10/32")
    (block,) = blocks(production, 443)
    assert str(control_plane) in block["except"]
    assert reachable(control_plane, [block]) == []


def test_nobody_calls_a_worker() -> None:
    """The system's namespace takes no connection; its worker may call out, and its placeholder may not."""
    for each in every_build():
        if each.has("network-policy"):
            deny = each.one("NetworkPolicy", "deny-all", SYSTEM)["spec"]
            assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
            (allowed,) = (policy for policy in each.of("NetworkPolicy", SYSTEM) if "egress" in policy["spec"])
            assert allowed["spec"]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "worker"}
