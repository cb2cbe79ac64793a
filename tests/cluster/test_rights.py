"""What the accounts of a deployment may do, asked of the API server that decides it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from infra.adapters.kube_pod import pod
from infra.adapters.kube_settings import KubeSettings
from infra.settings import Settings
from tests.cluster.cluster import Cluster, KubectlFailed
from tests.cluster.deployment import Deployment
from tests.contracts.sandboxes_contract import spec

Rules = dict[str, set[str]]  # the verbs for each resource or URL

ROLE: Rules = {
    "pods": {"get", "list", "watch", "create", "patch", "delete"},
    "pods/exec": {"get", "create"},
}
WHO_AM_I = {  # every account may ask for its own rights, and for nobody else's
    "selfsubjectreviews.authentication.k8s.io",
    "selfsubjectaccessreviews.authorization.k8s.io",
    "selfsubjectrulesreviews.authorization.k8s.io",
}
ROW = re.compile(r"(?P<resource>\S*)\s+\[(?P<url>.*?)\]\s+\[(?P<names>.*?)\]\s+\[(?P<verbs>.*?)\]")


@pytest.fixture(scope="session")
def worker(deployment: Deployment) -> Cluster:
    """kubectl with the worker's own token."""
    return Cluster(deployment.worker, deployment.sandboxes.namespace)


def rules(deployment: Deployment, account: str, namespace: str) -> Rules:
    """What `kubectl auth can-i --list` says that an account may do in a namespace, cluster-wide grants included."""
    user = deployment.account(account)
    listed = deployment.sandboxes.kubectl("auth", "can-i", "--list", "--no-headers", f"--as={user}", "-n", namespace)
    found: Rules = {}
    for line in listed.splitlines():
        row = ROW.fullmatch(line.strip()) or ROW.fullmatch(f" {line.strip()}")
        assert row, line
        assert not row["names"], "a right for one object by its name"
        found.setdefault(row["resource"] or row["url"], set()).update(row["verbs"].split())
    return found


def beyond(more: Rules, less: Rules) -> Rules:
    """The rights of `more` that `less` has not."""
    differences = {name: verbs - less.get(name, set()) for name, verbs in more.items()}
    return {name: verbs for name, verbs in differences.items() if verbs}


def namespaces(deployment: Deployment) -> list[str]:
    """All of them."""
    names = deployment.sandboxes.kubectl("get", "namespaces", "-o", "jsonpath={.items[*].metadata.name}")
    return names.split()


def test_the_worker_may_do_what_its_role_says_and_nothing_else(deployment: Deployment) -> None:
    """A worker that is taken over reaches sandboxes, which hold nothing but their own sessions."""
    here = deployment.sandboxes.namespace
    assert beyond(rules(deployment, "worker", here), rules(deployment, "nobody", here)) == ROLE


def test_the_worker_may_do_nothing_in_any_other_namespace(deployment: Deployment) -> None:
    """Not in its own either; a grant for the whole cluster would show in every one of them."""
    others = set(namespaces(deployment)) - {deployment.sandboxes.namespace}
    assert {deployment.system.namespace, "default", "kube-system"} <= others
    for each in others:
        assert beyond(rules(deployment, "worker", each), rules(deployment, "nobody", each)) == {}, each


def test_the_sandboxes_account_may_do_nothing(deployment: Deployment) -> None:
    """Its token would be worth nothing, and no pod has one."""
    for each in (deployment.sandboxes.namespace, deployment.system.namespace, "default"):
        assert rules(deployment, "sandbox", each) == rules(deployment, "nobody", each)


def test_an_account_without_a_role_may_only_ask_who_it_is(deployment: Deployment) -> None:
    """What the others are compared with is no right in itself; URLs are those of versions, schemas and health."""
    granted = rules(deployment, "nobody", deployment.sandboxes.namespace)
    resources = {name for name in granted if not name.startswith("/")}
    assert resources == WHO_AM_I
    assert all(granted[name] == {"create"} for name in resources)
    assert all(granted[name] == {"get"} for name in granted.keys() - resources)


@pytest.mark.parametrize(
    "words",
    [
        "get secrets --all-namespaces",
        "get pods --all-namespaces",
        "get configmaps",
        "get nodes",
        "get --raw /metrics",
        "create token sandbox",
        "create token worker --namespace SYSTEM",
        "delete pods --all --namespace SYSTEM",
        "delete resourcequota sandboxes",
        "delete namespace SYSTEM --dry-run=server",
        "create rolebinding mine --clusterrole=cluster-admin --user=me --dry-run=server",
        "get pods --as=system:admin",
    ],
)
def test_the_worker_is_refused(words: str, worker: Cluster, deployment: Deployment) -> None:
    """What would lead out of the sandboxes, done with its own token."""
    with pytest.raises(KubectlFailed, match="forbidden"):
        worker.kubectl(*words.replace("SYSTEM", deployment.system.namespace).split())


def test_the_token_is_the_workers(worker: Cluster, deployment: Deployment) -> None:
    """Every other test of a session runs by these rights, not by an administrator's."""
    review = json.loads(worker.kubectl("auth", "whoami", "-o", "json"))
    assert review["status"]["userInfo"]["username"] == deployment.account("worker")


def protected(deployment: Deployment) -> dict[str, Any]:
    """A session's pod as the worker makes it."""
    settings: KubeSettings = Settings.from_environment(deployment.environment).kube
    return pod(spec("tried", "tried"), settings)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("spec.hostNetwork", True),
        ("spec.hostPID", True),
        ("spec.hostIPC", True),
        ("spec.volumes", [{"name": "host", "hostPath": {"path": "/"}}]),
        ("spec.securityContext.runAsNonRoot", False),
        ("spec.securityContext.runAsUser", 0),
        ("spec.securityContext.seccompProfile", {"type": "Unconfined"}),
        ("spec.containers.0.securityContext", {"privileged": True}),
        ("spec.containers.0.securityContext.allowPrivilegeEscalation", True),
        ("spec.containers.0.securityContext.capabilities", {"add": ["SYS_ADMIN"]}),
        ("spec.containers.0.ports", [{"containerPort": 80, "hostPort": 80}]),
    ],
)
def test_the_worker_cannot_make_a_pod_that_is_not_restricted(
    place: str, value: object, worker: Cluster, deployment: Deployment
) -> None:
    """Whoever has its token has no way to the node: the namespace takes restricted pods only."""
    wanted = protected(deployment)
    *path, last = place.split(".")
    inner: Any = wanted
    for part in path:
        inner = inner[int(part)] if part.isdigit() else inner[part]
    inner[last] = value
    if last == "volumes":
        wanted["spec"]["containers"][0]["volumeMounts"] = [{"name": "host", "mountPath": "/host"}]
    with pytest.raises(KubectlFailed, match=r'violates PodSecurity "restricted|disallowed by cluster policy'):
        worker.kubectl("create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(wanted))


def test_a_sessions_pod_itself_is_taken(worker: Cluster, deployment: Deployment) -> None:
    """The refusals above are for what was changed, and for nothing else."""
    made = worker.kubectl("create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(protected(deployment)))
    assert "created" in made
