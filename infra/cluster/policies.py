"""NetworkPolicy, as far as it can matter here: what pods may call.

The rules of `configuration.firewall` already close every way into a pod and every way to another one, so peers named
by labels are out of reach and only egress to addresses is left. nftables enforces it in a table of its own: a packet
has to pass both. A pod that is not known yet, or no longer, reaches nothing.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from infra.cluster.api import Api
from infra.cluster.configuration import disjoint
from infra.cluster.layout import BRIDGE, POLICY_TABLE, Layout

Object = dict[str, Any]

PODS = "/api/v1/pods"
POLICIES = "/apis/networking.k8s.io/v1/networkpolicies"
ANY_ADDRESS = "ip daddr 0.0.0.0/0"
SETTLE_SECONDS = 0.05  # what changes together is applied together
RETRY_SECONDS = 1.0


def rules(pods: list[Object], policies: list[Object]) -> str:
    """The nftables script that replaces all earlier rules at once."""
    ways: dict[str, str] = {}
    chains: dict[str, str] = {}
    for pod in pods:
        if "podIP" in pod["status"] and pod["status"].get("phase") in ("Pending", "Running"):
            found = _egress_of(pod, policies)
            ways[pod["status"]["podIP"]] = "accept" if found is None else f"jump {_chain(chains, found)}"
    table = f"table inet {POLICY_TABLE}"
    verdicts = ", ".join(f"{address} : {way}" for address, way in sorted(ways.items()))
    dispatch = f"    ip saddr vmap {{ {verdicts} }}\n" if ways else ""
    bodies = "".join(f"  chain {name} {{\n{allowed}    drop\n  }}\n" for allowed, name in chains.items())
    return f"""{table}
delete {table}
{table} {{
{bodies}  chain forward {{
    type filter hook forward priority filter + 10; policy accept;
    iifname != "{BRIDGE}" accept
    ct state established,related accept
{dispatch}    drop
  }}
}}
"""


def _chain(chains: dict[str, str], allowed: str) -> str:
    return chains.setdefault(allowed, f"egress-{len(chains)}")


def _egress_of(pod: Object, policies: list[Object]) -> str | None:
    """The rules of what this pod may call; None where no policy restricts it."""
    selecting = [policy for policy in policies if _restricts(policy, pod)]
    allowed = [line for policy in selecting for rule in policy["spec"].get("egress") or [] for line in _allowed(rule)]
    return "".join(f"    {line} accept\n" for line in allowed) if selecting else None


def _restricts(policy: Object, pod: Object) -> bool:
    spec, labels = policy["spec"], pod["metadata"].get("labels", {})
    types = spec.get("policyTypes") or (["Ingress", "Egress"] if spec.get("egress") else ["Ingress"])
    same_namespace = policy["metadata"]["namespace"] == pod["metadata"]["namespace"]
    return "Egress" in types and same_namespace and selects(spec.get("podSelector", {}), labels)


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector matches. Raises KeyError for an operator that Kubernetes does not have."""
    exact: dict[str, str] = selector.get("matchLabels") or {}
    return exact.items() <= labels.items() and all(
        _holds(expression, labels) for expression in selector.get("matchExpressions") or []
    )


def _holds(expression: Object, labels: dict[str, str]) -> bool:
    key, values = expression["key"], expression.get("values", [])
    return {
        "In": labels.get(key) in values,
        "NotIn": labels.get(key) not in values,
        "Exists": key in labels,
        "DoesNotExist": key not in labels,
    }[expression["operator"]]


def _allowed(rule: Object) -> list[str]:
    """The matches of one egress rule: each of its addresses with each of its ports."""
    peers = rule.get("to")
    addresses = [_block(peer["ipBlock"]) for peer in peers if _is_v4_block(peer)] if peers else [ANY_ADDRESS]
    ports = [port for port in map(_port, rule["ports"]) if port] if rule.get("ports") else [""]
    return [f"{address} {port}".rstrip() for address in addresses for port in ports]


def _is_v4_block(peer: Object) -> bool:
    return "ipBlock" in peer and ":" not in peer["ipBlock"]["cidr"]


def _block(block: Object) -> str:
    excepted = ", ".join(disjoint(block.get("except") or []))
    return f"ip daddr {block['cidr']}" + (f" ip daddr != {{ {excepted} }}" if excepted else "")


def _port(port: Object) -> str:
    """Its match; "" for a port with a name, which belongs to another pod and is out of reach."""
    number, protocol = port.get("port"), port.get("protocol", "TCP").lower()
    if number is None:
        return f"meta l4proto {protocol}"
    if isinstance(number, str):
        return ""
    return f"{protocol} dport {number}-{port['endPort']}" if "endPort" in port else f"{protocol} dport {number}"


def apply(script: str) -> None:
    """Replace the rules. Raises CalledProcessError if nft refuses them; the old ones stay then."""
    subprocess.run(("nft", "-f", "-"), input=script, text=True, check=True)


def follow(layout: Layout) -> None:
    """Apply the policies of this cluster, and again whenever a pod or a policy changes. Does not return."""
    api, changed, applied = Api(layout), threading.Event(), ""
    for path in (PODS, POLICIES):
        threading.Thread(target=_watch, args=(api, path, changed), daemon=True).start()
    while True:
        changed.wait()
        time.sleep(SETTLE_SECONDS)
        changed.clear()
        try:
            script = rules(api.json(PODS)["items"], api.json(POLICIES)["items"])
        except OSError:
            changed.set()
            time.sleep(RETRY_SECONDS)
            continue
        if script != applied:
            apply(script)
            applied = script


def _watch(api: Api, path: str, changed: threading.Event) -> None:
    """Say so at every change; also at the start, and after a gap in which there may have been one."""
    while True:
        changed.set()
        try:
            for _ in api.lines(f"{path}?watch=true"):
                changed.set()
        except OSError:
            time.sleep(RETRY_SECONDS)


if __name__ == "__main__":
    follow(Layout(Path(sys.argv[1])))
