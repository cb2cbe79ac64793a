"""What the manifests promise, in every build: each overlay, and the base with each choice of components."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from itertools import pairwise
from typing import Any

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import pytest

from consumers.worker import DRAIN_SECONDS as HANDOVER_SECONDS
from infra.adapters.kube_pod import agent_config_map, pod
from infra.adapters.kube_settings import LARGE, SMALL, Size
from infra.kubernetes.agent import KUSTOMIZATION, kustomization
from infra.server import DRAIN_SECONDS
from infra.settings import OBJECTS, PREFIX, Settings
from schemas.limits import Limits
from schemas.ports import SandboxSpec
from schemas.topics import EVENTS_SUBSCRIPTION, LINKS_SUBSCRIPTION
from tests.infra.manifests import (
    SANDBOXES,
    SYSTEM,
    Build,
    Object,
    build,
    every_build,
    namespace_of,
    quantity,
    restricted,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # 34 builds, each a process, made once

VERSIONS = ("1.32", "1.34", "1.37")  # the oldest that GKE's stable channel offered, the local cluster's, the newest
MARGIN_SECONDS = 10  # for the signal to arrive and the process to end
RESOURCES = ("cpu", "memory", "ephemeral-storage")

# KEDA's resources are no part of Kubernetes' schemas. These name every field that the manifests use and no other, with
# the types of KEDA's own definitions (keda.sh/v1alpha1 of 2.17).
TEXT: Object = {"type": "string", "minLength": 1}
COUNT: Object = {"type": "integer", "minimum": 0}


def closed(required: tuple[str, ...] = (), **properties: Object) -> Object:
    """The schema of an object with these properties only, some of which must be there; all, unless they are named."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required or properties),
        "additionalProperties": False,
    }


TRIGGER = closed(
    type={"const": "prometheus"},
    name=TEXT,
    metadata=closed(serverAddress=TEXT, query=TEXT, threshold=TEXT, activationThreshold=TEXT),
    authenticationRef=closed(name=TEXT),
)
POLICY = closed(type={"enum": ["Pods", "Percent"]}, value=COUNT, periodSeconds={**COUNT, "maximum": 1800})
SCALE_DOWN = closed(
    stabilizationWindowSeconds={**COUNT, "maximum": 3600}, policies={"type": "array", "items": POLICY, "minItems": 1}
)
KEDA = {
    "ScaledObject": closed(
        scaleTargetRef=closed(name=TEXT),
        minReplicaCount=COUNT,
        maxReplicaCount={**COUNT, "minimum": 1},
        pollingInterval={**COUNT, "minimum": 1},
        cooldownPeriod=COUNT,
        fallback=closed(
            failureThreshold=COUNT, replicas=COUNT, behavior={"enum": ["static", "currentReplicasIfHigher"]}
        ),
        advanced=closed(horizontalPodAutoscalerConfig=closed(behavior=closed(scaleDown=SCALE_DOWN))),
        triggers={"type": "array", "items": TRIGGER, "minItems": 1},
    ),
    "TriggerAuthentication": closed(podIdentity=closed(provider={"const": "gcp"})),
}


def in_every_build(check: Callable[[Build], None]) -> Callable[[], None]:
    """A test that checks every build and names the one that breaks the promise."""

    def test() -> None:
        for each in every_build():
            try:
                check(each)
            except AssertionError as error:
                raise AssertionError(f"in the build {each.name}: {error}") from error

    test.__doc__ = check.__doc__
    return test


@pytest.mark.parametrize("version", VERSIONS)
def test_every_build_is_what_the_api_server_takes(version: str) -> None:
    """No unknown field, no wrong type, on old and new clusters."""
    seen: set[str] = set()
    for each in every_build():
        for manifest in each.objects:
            text = json.dumps(manifest, sort_keys=True)
            if text in seen:
                continue
            seen.add(text)
            if manifest["apiVersion"] == "keda.sh/v1alpha1":
                jsonschema.validate(manifest["spec"], KEDA[manifest["kind"]])
            else:
                kubernetes_validate.validate(manifest, version, strict=True)


@in_every_build
def test_namespaces_enforce_restricted_pod_security(build: Build) -> None:
    """Neither a worker nor a session can be more than an ordinary process, whoever makes its pod."""
    namespaces = {each["metadata"]["name"]: each["metadata"]["labels"] for each in build.of("Namespace")}
    assert set(namespaces) == {SYSTEM, SANDBOXES}
    for labels in namespaces.values():
        assert [labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "audit", "warn")] == [
            "restricted"
        ] * 3


@in_every_build
def test_every_pod_is_restricted(build: Build) -> None:
    """What the manifests run passes the Pod Security of its own namespace, on a read-only root with limits."""
    for template in build.pod_templates():
        assert restricted(template) == []
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"]
            resources = container["resources"]
            assert resources["requests"] == resources["limits"]
            assert set(resources["limits"]) == set(RESOURCES)


@in_every_build
def test_nothing_reaches_out_of_the_cluster_or_into_a_node(build: Build) -> None:
    """No load balancer, no port or path of a host, nothing privileged, anywhere in the text."""
    text = json.dumps([each for each in build.objects if "__main__.py" not in each.get("data", {})])
    for word in ("LoadBalancer", "NodePort", "hostPath", "hostNetwork", "hostPID", "hostIPC", "hostPort", "privileged"):
        assert word not in text.replace("unprivileged", "")
    assert build.of("Service") == build.of("Ingress") == build.of("Secret") == build.of("PersistentVolumeClaim") == []


@in_every_build
def test_the_sandboxes_namespace_holds_nothing_else(build: Build) -> None:
    """Whoever makes pods can use every account and secret beside them: there are none worth using."""
    kinds = {each["kind"] for each in build.objects if namespace_of(each) == SANDBOXES}
    assert kinds == {
        *("ServiceAccount", "Role", "RoleBinding", "ResourceQuota", "LimitRange", "NetworkPolicy", "ConfigMap")
    }
    hard = build.one("ResourceQuota", "nothing-else")["spec"]["hard"]
    assert set(hard.values()) == {"0"}
    assert {"count/secrets", "count/services", "count/persistentvolumeclaims", "count/jobs.batch"} <= set(hard)


@in_every_build
def test_a_worker_may_make_and_reach_pods_and_nothing_else(build: Build) -> None:
    """The only role there is, for the only account that has one."""
    assert build.of("ClusterRole") == build.of("ClusterRoleBinding") == []
    (role,), (binding,) = build.of("Role"), build.of("RoleBinding")
    assert role["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch", "create", "patch", "delete"]},
        {"apiGroups": [""], "resources": ["pods/exec"], "verbs": ["get", "create"]},
    ]
    assert namespace_of(role) == namespace_of(binding) == SANDBOXES
    assert binding["roleRef"] == {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "worker"}
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "worker", "namespace": SYSTEM}]


@in_every_build
def test_only_the_worker_has_a_token(build: Build) -> None:
    """Accounts give none by default; sessions have an account without a cloud identity too."""
    assert all(each["automountServiceAccountToken"] is False for each in build.of("ServiceAccount"))
    assert {each["metadata"]["name"] for each in build.of("ServiceAccount", SANDBOXES)} == {"sandbox", "default"}
    assert not any("annotations" in each["metadata"] for each in build.of("ServiceAccount", SANDBOXES))
    tokens = [each for each in build.pod_templates() if each["spec"]["automountServiceAccountToken"]]
    assert [each["spec"]["serviceAccountName"] for each in tokens] == ["worker"]


@in_every_build
def test_a_worker_has_time_to_hand_its_sessions_over(build: Build) -> None:
    """SIGKILL comes after the drain, and a rolling update or a drained node takes one worker at a time."""
    worker = build.one("Deployment", "worker")
    grace = worker["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= DRAIN_SECONDS + MARGIN_SECONDS
    assert DRAIN_SECONDS > HANDOVER_SECONDS
    assert worker["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    budget = build.one("PodDisruptionBudget", "worker")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"] == worker["spec"]["selector"]


@in_every_build
def test_probes_ask_where_the_worker_answers(build: Build) -> None:
    """On the port of its settings, on every interface: a pod's probes come from outside of it."""
    (container,) = build.one("Deployment", "worker")["spec"]["template"]["spec"]["containers"]
    settings = build.settings
    (port,) = container["ports"]
    assert (port["containerPort"], settings.health_host) == (settings.health_port, "0.0.0.0")
    paths = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"startupProbe": "/healthz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}
    assert container["command"] == ["pigeon", "worker"]


@in_every_build
def test_the_worker_understands_its_configuration(build: Build) -> None:
    """Every variable is a setting of the worker: none is misspelt and ignored."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    known |= {f"{PREFIX}{name}_{field}".upper() for name, model in OBJECTS.items() for field in model.model_fields}
    assert {name for name in build.configuration if name.startswith(PREFIX)} <= known
    assert (build.settings.sandboxes, build.settings.kube.namespace) == ("kubernetes", SANDBOXES)
    (secret,) = build.one("Deployment", "worker")["spec"]["template"]["spec"]["containers"][0]["env"]
    assert secret["name"] == "PIGEON_WORKER_SECRET"
    assert "secretKeyRef" in secret["valueFrom"]


def spec_of(size: Size, session: str | None = "s1") -> SandboxSpec:
    """A sandbox of that size."""
    limits = Limits()
    return SandboxSpec(
        name="session-s1",
        session=session,
        memory_bytes=size.memory_bytes,
        workspace_bytes=limits.workspace_bytes,
        processes=limits.processes,
        file_bytes=limits.file_bytes,
        lifetime_seconds=3600,
    )


@in_every_build
def test_a_sessions_pod_is_admitted(build: Build) -> None:
    """Pods of both sizes, warm ones too, fit Pod Security, limits, accounts and priorities of their namespace."""
    classes = {each["metadata"]["name"] for each in build.of("PriorityClass")}
    accounts = {each["metadata"]["name"] for each in build.of("ServiceAccount", SANDBOXES)}
    (limits,) = build.one("LimitRange", "sandboxes")["spec"]["limits"]
    for spec in (spec_of(SMALL), spec_of(LARGE), spec_of(SMALL, session=None)):
        manifest = pod(spec, build.settings.kube)
        assert restricted(manifest) == []
        assert manifest["spec"]["priorityClassName"] in classes
        assert manifest["spec"]["serviceAccountName"] in accounts
        assert manifest["spec"]["containers"][0]["image"] == build.configuration["PIGEON_KUBE_IMAGE"]
        (container,) = manifest["spec"]["containers"]
        for name in RESOURCES:
            asked = quantity(container["resources"]["requests"][name])
            assert asked == quantity(container["resources"]["limits"][name])
            assert quantity(limits["min"][name]) <= asked <= quantity(limits["max"][name])


def sizes(small: int, large: int) -> dict[str, Decimal]:
    """What so many pods of each size request together."""
    cpu = Decimal(small * SMALL.cpu + large * LARGE.cpu) / 1000
    memory = Decimal(small * SMALL.memory_bytes + large * LARGE.memory_bytes)
    return {
        "cpu": cpu,
        "memory": memory,
        "ephemeral-storage": Decimal(small * SMALL.disk_bytes + large * LARGE.disk_bytes),
    }


@in_every_build
def test_the_quota_is_the_sum_of_what_sessions_request(build: Build) -> None:
    """A fifth of the sessions may be large ones; the warm pool, of small ones, has room of its own."""
    hard = build.one("ResourceQuota", "sandboxes")["spec"]["hard"]
    capacity, warm = build.settings.limits.capacity, build.settings.limits.pool_size
    large = capacity // 5
    assert int(hard["pods"]) == capacity + warm
    for name, total in sizes(capacity - large + warm, large).items():
        assert quantity(hard[f"requests.{name}"]) == quantity(hard[f"limits.{name}"]) == total


def test_twenty_sessions_and_no_warm_pool_in_production() -> None:
    """What costs money while nobody is there has to be chosen."""
    production = build("production")
    assert (production.settings.limits.capacity, production.settings.limits.pool_size) == (20, 0)
    assert [each["metadata"]["name"] for each in production.of("Deployment")] == ["worker"]


@in_every_build
def test_limits_are_a_small_sessions_by_default_and_a_large_ones_at_most(build: Build) -> None:
    """A pod that names no resources is not refused by the quota, and none can have more than it requests."""
    (limits,) = build.one("LimitRange", "sandboxes")["spec"]["limits"]
    for name, small in sizes(1, 0).items():
        assert quantity(limits["default"][name]) == quantity(limits["defaultRequest"][name]) == small
        assert quantity(limits["max"][name]) == sizes(0, 1)[name]
        assert limits["maxLimitRequestRatio"][name] == "1"


@in_every_build
def test_priorities_say_who_gives_way(build: Build) -> None:
    """Placeholders to sessions, sessions to workers; a warm pod, once claimed, is worth what a session is."""
    value = {each["metadata"]["name"]: each["value"] for each in build.of("PriorityClass")}
    order = ("pigeon-worker", "pigeon-session", "pigeon-placeholder")
    assert all(value[higher] > value[lower] for higher, lower in pairwise(order))
    assert value["pigeon-warm"] == value["pigeon-session"]
    assert value["pigeon-placeholder"] >= -10  # below it a cluster autoscaler adds no node
    assert build.one("PriorityClass", "pigeon-warm")["preemptionPolicy"] == "Never"
    assert not any(each.get("globalDefault") for each in build.of("PriorityClass"))


@in_every_build
def test_the_agent_is_the_one_that_workers_look_for(build: Build) -> None:
    """By name, by content, and for ever the same."""
    expected = agent_config_map(SANDBOXES)
    found = build.one("ConfigMap", expected["metadata"]["name"])
    assert found["metadata"]["namespace"] == SANDBOXES
    assert (found["data"], found["immutable"]) == (expected["data"], True)


def test_the_agents_name_is_up_to_date() -> None:
    """After a change of the agent: `python -m infra.kubernetes.agent`."""
    assert KUSTOMIZATION.read_text() == kustomization()


def components(name: str) -> list[Build]:
    """Every build with that component."""
    return [each for each in every_build() if each.has(name)]


def test_on_gvisor_everything_of_sessions_is() -> None:
    """The pods that workers make, the room that is kept for them, and the API server refuses any other."""
    for each in components("gvisor"):
        assert pod(spec_of(SMALL), each.settings.kube)["spec"]["runtimeClassName"] == "gvisor"
        for deployment in each.of("Deployment"):
            kept = deployment["metadata"]["name"] == "placeholder"
            assert ("runtimeClassName" in deployment["spec"]["template"]["spec"]) == kept
        policy = each.one("ValidatingAdmissionPolicy", "pigeon-sandboxes-on-gvisor")
        binding = each.one("ValidatingAdmissionPolicyBinding", "pigeon-sandboxes-on-gvisor")
        assert binding["spec"]["policyName"] == policy["metadata"]["name"]
        assert binding["spec"]["validationActions"] == ["Deny"]
        assert policy["spec"]["failurePolicy"] == "Fail"
        selector = binding["spec"]["matchResources"]["namespaceSelector"]["matchLabels"]
        assert selector == {"kubernetes.io/metadata.name": SANDBOXES}


def test_a_placeholder_keeps_the_room_of_a_session() -> None:
    """Of a small one, with the image that sessions run, and gone at once when one needs it."""
    for each in components("placeholder"):
        spec = each.one("Deployment", "placeholder", SYSTEM)["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        assert {name: quantity(value) for name, value in container["resources"]["requests"].items()} == sizes(1, 0)
        assert container["image"] == each.settings.kube.image
        assert (spec["priorityClassName"], spec["terminationGracePeriodSeconds"]) == ("pigeon-placeholder", 0)


def test_workers_scale_from_none_on_what_waits_and_what_lives() -> None:
    """Waiting events or live sessions wake a worker; nothing else does, ticks least of all."""
    for each in components("autoscaling"):
        scaled: Any = each.one("ScaledObject", "worker")["spec"]
        assert (scaled["minReplicaCount"], scaled["scaleTargetRef"]["name"]) == (0, "worker")
        assert "replicas" not in each.one("Deployment", "worker")["spec"]  # two owners would fight
        events, sessions = (trigger["metadata"] for trigger in scaled["triggers"])
        assert f'subscription_id="{EVENTS_SUBSCRIPTION.name}"' in events["query"]
        assert f'subscription_id="{LINKS_SUBSCRIPTION.name}"' in sessions["query"]
        assert events["activationThreshold"] == sessions["activationThreshold"] == "0"
        assert 2 * int(sessions["threshold"]) <= LINKS_SUBSCRIPTION.max_outstanding
        references = {trigger["authenticationRef"]["name"] for trigger in scaled["triggers"]}
        assert references == {each.one("TriggerAuthentication", "monitoring")["metadata"]["name"]}


def test_production_is_filled_in_from_one_file() -> None:
    """deployment.env reaches every place that names the deployment, and no placeholder is left."""
    production = build("production")
    text = json.dumps(production.objects)
    assert "from-deployment.env" not in text
    assert production.configuration["PIGEON_PROJECT"] == "example-project"
    account = production.one("ServiceAccount", "worker", SYSTEM)["metadata"]["annotations"]
    assert account == {"iam.gke.io/gcp-service-account": "pigeon-worker@example-project.iam.gserviceaccount.com"}
    for trigger in production.one("ScaledObject", "worker")["spec"]["triggers"]:
        assert "/v1/projects/example-project/location/" in trigger["metadata"]["serverAddress"]
    assert not any(each["metadata"]["name"] == "deployment" for each in production.objects)


def test_production_names_images_by_digest() -> None:
    """What was tested is what runs, and what a node has cached is right for ever."""
    production = build("production")
    images = [production.settings.kube.image]
    images += [container["image"] for each in production.pod_templates() for container in each["spec"]["containers"]]
    assert all("@sha256:" in image and len(image.rpartition(":")[2]) == 64 for image in images)


@in_every_build
def test_every_check_that_is_skipped_says_why(build: Build) -> None:
    """checkov is silenced for one object at a time, with a reason."""
    for each in build.objects:
        for name, value in each["metadata"].get("annotations", {}).items():
            if name.startswith("checkov.io/skip"):
                check, _, reason = value.partition("=")
                assert check.startswith("CKV_K8S_")
                assert len(reason.split()) >= 5
