"""The pod of a sandbox: what it says, and that nothing it says lets hostile code out."""

from __future__ import annotations

import itertools
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from consumers.agent import agent
from infra.adapters.kube_pod import (
    AGENT_SOURCE,
    GRACE_SECONDS,
    NICE,
    agent_config_map,
    agent_config_map_name,
    pod,
)
from infra.adapters.kube_settings import LARGE, SMALL, KubeSettings, Size
from schemas.errors import SandboxFailed
from schemas.limits import MIB, Limits
from schemas.ports import SandboxSpec
from tests.kube.pods import insecurities
from tests.kube.quantities import quantity

DEFAULTS = KubeSettings()
FULL = KubeSettings(
    runtime_class="gvisor",
    user_namespaces=True,
    nameservers=("8.8.8.8",),
    node_selector={"sandbox.gke.io/runtime": "gvisor"},
    tolerations=({"key": "sandbox.gke.io/runtime", "operator": "Equal", "value": "gvisor", "effect": "NoSchedule"},),
    allowed_images=("docker.io/library/python:*",),
    inject_agent=True,
)
VERSIONS = ("1.29", "1.32", "1.35")


def spec(name: str = "session-one", session: str | None = "s-one", **other: Any) -> SandboxSpec:
    """A session's sandbox with the default limits."""
    limits = Limits()
    fields = {
        "memory_bytes": limits.memory_bytes,
        "workspace_bytes": limits.workspace_bytes,
        "processes": limits.processes,
        "file_bytes": limits.file_bytes,
        "lifetime_seconds": 3_600,
    }
    return SandboxSpec(name=name, session=session, **{**fields, **other})


def container(of: dict[str, Any]) -> dict[str, Any]:
    """The one container of a pod."""
    (only,) = of["spec"]["containers"]
    found: dict[str, Any] = only
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("settings", [DEFAULTS, FULL], ids=["defaults", "everything"])
def test_the_api_server_knows_every_field(settings: KubeSettings, version: str) -> None:
    """A misspelt field is dropped silently by a server, with the protection it was to be."""
    for session in ("s-one", None):
        kubernetes_validate.validate(pod(spec(session=session), settings), version, strict=True)
    kubernetes_validate.validate(agent_config_map("somewhere"), version, strict=True)


@pytest.mark.parametrize("settings", [DEFAULTS, FULL], ids=["defaults", "everything"])
def test_it_keeps_the_restricted_pod_security_standard(settings: KubeSettings) -> None:
    """A namespace that enforces `restricted` takes it, and only listed kinds of volume are mounted."""
    made = pod(spec(), settings)
    assert insecurities(made["spec"]) == []
    kinds = {kind for volume in made["spec"]["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"emptyDir", "configMap"}
    security = container(made)["securityContext"]
    assert security["readOnlyRootFilesystem"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert "add" not in security["capabilities"]


def test_user_code_is_given_no_credential_and_no_names_of_services() -> None:
    """Nothing in the pod knows of the API server or of a neighbour."""
    made = pod(spec(), DEFAULTS)["spec"]
    assert made["automountServiceAccountToken"] is False
    assert made["enableServiceLinks"] is False
    assert made["serviceAccountName"] == "sandbox"
    assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & made.keys()
    assert made["dnsPolicy"] == "None"
    assert not {"envFrom"} & container({"spec": made}).keys()
    assert not any("valueFrom" in variable for variable in container({"spec": made})["env"])


@pytest.mark.parametrize(
    ("memory", "workspace", "size"),
    [(64 * MIB, MIB, SMALL), (512 * MIB, 256 * MIB, SMALL), (513 * MIB, MIB, LARGE), (MIB, 1_500 * MIB, LARGE)],
)
def test_the_smallest_size_that_fits_is_taken(memory: int, workspace: int, size: Size) -> None:
    """Requests equal limits, so that a neighbour takes nothing that a sandbox counts on."""
    made = container(pod(spec(memory_bytes=memory, workspace_bytes=workspace), DEFAULTS))
    resources = made["resources"]
    assert resources["requests"] == resources["limits"]
    assert quantity(resources["limits"]["memory"]) == size.memory_bytes
    assert quantity(resources["limits"]["cpu"]) * 1_000 == size.cpu
    assert quantity(resources["limits"]["ephemeral-storage"]) == size.disk_bytes


def test_more_than_the_largest_size_is_refused() -> None:
    """A deployment's limits and sizes must fit together; the error says what does not."""
    with pytest.raises(SandboxFailed, match="4096 MiB of memory"):
        pod(spec(memory_bytes=4_096 * MIB), DEFAULTS)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"unschedulable_seconds": seconds} for seconds in (0, -1, "inf", "nan", 86_401)),
        *({"sizes": ({**SMALL.model_dump(), field: 0},)} for field in ("cpu", "memory_bytes", "disk_bytes")),
        *({"sizes": ({**SMALL.model_dump(), "name": name},)} for name in ("", "Very Large", "x" * 64, "a\n")),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_at_the_start(wrong: dict[str, Any]) -> None:
    """And not by the first session that meets them."""
    with pytest.raises(ValidationError):
        KubeSettings(**wrong)


def test_every_directory_that_can_be_written_has_a_limit() -> None:
    """A full disk ends one pod, never a node."""
    made = pod(spec(workspace_bytes=100 * MIB), DEFAULTS)["spec"]
    sizes = {each["name"]: quantity(each["emptyDir"]["sizeLimit"]) for each in made["volumes"]}
    assert sizes["workspace"] == 100 * MIB
    assert sum(sizes.values()) <= SMALL.disk_bytes


def test_it_ends_by_itself() -> None:
    """Nobody has to be there to end it, and the agent has given up its spool before the node loses patience."""
    made = pod(spec(lifetime_seconds=77), DEFAULTS)
    assert made["spec"]["activeDeadlineSeconds"] == 77
    assert made["spec"]["restartPolicy"] == "Never"
    assert made["spec"]["terminationGracePeriodSeconds"] == GRACE_SECONDS
    command = container(made)["command"]
    assert command[command.index("--grace") + 1] == str(GRACE_SECONDS)


def test_the_agent_understands_its_command_line() -> None:
    """Agent and manifest are one program in two files."""
    command = container(pod(spec(processes=64, file_bytes=9 * MIB), DEFAULTS))["command"]
    assert command[:3] == ["python3", "-I", "-S"]
    assert callable(agent._work(command[4:]))
    assert {"NPROC=64", f"FSIZE={9 * MIB}"} < set(command)
    assert command[command.index("--nice") + 1] == str(NICE)


def test_pods_that_share_a_kernel_share_no_user_id() -> None:
    """The kernel counts processes by user id: one pod's fork bomb must not use up another's limit."""
    users = {pod(spec(name=f"n{each}"), DEFAULTS)["spec"]["securityContext"]["runAsUser"] for each in range(200)}
    assert len(users) == 200
    assert min(users) >= 100_000
    shared = [pod(spec(name=name), FULL)["spec"]["securityContext"]["runAsUser"] for name in ("one", "two")]
    assert shared == [1_000, 1_000]
    assert pod(spec(), FULL)["spec"]["hostUsers"] is False


def test_only_allowed_images_run() -> None:
    """A session cannot name an image that nobody has looked at."""
    assert container(pod(spec(), FULL))["image"] == FULL.image
    chosen = pod(spec(image="docker.io/library/python:3.12"), FULL)
    assert container(chosen)["image"] == "docker.io/library/python:3.12"
    for image in ("docker.io/library/python", "evil.example/docker.io/library/python:3", "docker.io/library/ruby:3"):
        with pytest.raises(SandboxFailed, match="not allowed"):
            pod(spec(image=image), FULL)


def test_an_image_without_agent_is_given_one() -> None:
    """Any Python image will do; the agent is the one this worker speaks to."""
    settings = KubeSettings(allowed_images=("*",))
    mounted = [
        {each["name"] for each in container(pod(spec(image=image), settings))["volumeMounts"]} for image in ("", "p:3")
    ]
    assert mounted[1] - mounted[0] == {"agent"}
    (volume,) = [each for each in pod(spec(image="p:3"), settings)["spec"]["volumes"] if each["name"] == "agent"]
    given_map = agent_config_map("somewhere")
    assert volume["configMap"]["name"] == given_map["metadata"]["name"] == agent_config_map_name()
    assert given_map["immutable"]
    assert given_map["data"] == {"__main__.py": AGENT_SOURCE.read_text()}


def test_warm_pods_and_sessions_are_told_apart() -> None:
    """Quotas go by priority class, claims by label."""
    warm, own = (pod(spec(session=session), DEFAULTS) for session in (None, "s-one"))
    assert warm["spec"]["priorityClassName"] != own["spec"]["priorityClassName"]
    assert "pigeon/session" not in warm["metadata"]["labels"]
    assert own["metadata"]["labels"]["pigeon/session"] == "s-one"


@pytest.mark.parametrize("name", ["", "..", "a/b", "Upper", "x" * 64, "-a", "a-", "a\n"])
def test_what_is_no_name_never_becomes_a_pod(name: str) -> None:
    """Names come from ids, and are checked all the same."""
    with pytest.raises(SandboxFailed):
        pod(spec(name=name), DEFAULTS)
    with pytest.raises(SandboxFailed):
        pod(spec(session=f"{name}/"), DEFAULTS)


@given(
    name=st.from_regex(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", fullmatch=True),
    session=st.none() | st.from_regex(r"s[a-z2-7]{25}", fullmatch=True),
    lifetime=st.integers(1, 10**6),
    processes=st.integers(1, 10**4),
)
def test_the_same_sandbox_is_always_the_same_pod(name: str, session: str | None, lifetime: int, processes: int) -> None:
    """A retry after a lost answer creates nothing else, and every label is one."""
    wanted = spec(name=name, session=session, lifetime_seconds=lifetime, processes=processes)
    made = pod(wanted, FULL)
    assert made == pod(wanted, FULL)
    assert all(len(value) <= 63 for value in made["metadata"]["labels"].values())
    strings = itertools.chain(made["metadata"]["labels"].values(), container(made)["command"])
    assert all(isinstance(value, str) for value in strings)
