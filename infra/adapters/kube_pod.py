"""A sandbox as a pod: one pure function from a `SandboxSpec` to the object that is created."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Any

from infra.adapters.kube_settings import KubeSettings, Size
from schemas.errors import SandboxFailed
from schemas.limits import MIB
from schemas.ports import SandboxSpec

Object = dict[str, Any]

AGENT_SOURCE = Path(__file__).parents[2] / "consumers" / "agent" / "agent.py"
AGENT = "/opt/pigeon/agent"  # a directory with __main__.py, which costs Python less memory than a file
AGENT_SOCKET = "@pigeon-agent"  # abstract: nobody in the sandbox can unlink or replace it
WORKSPACE, RUN_DIR, TMP = "/workspace", "/run/pigeon", "/tmp"  # noqa: S108 - the pod's own
CONTAINER = "sandbox"
PYTHON = "python3"

RUN_BYTES = 32 * MIB  # the agent's files of commands
TMP_BYTES = 128 * MIB
GRACE_SECONDS = 20  # from SIGTERM to SIGKILL; Spot nodes leave 25
NICE = 10  # of user code: where 120 of its processes use all of a pod's processor, the agent still gets its turn
GROUP = 1_000
USER = 1_000
OWN_USERS = range(100_000, 2_000_000_000)
USER_VARIABLES = {
    "HOME": WORKSPACE,
    "USER": "user",
    "LOGNAME": "user",
    "TERM": "xterm-256color",
    "LANG": "C.UTF-8",
    "TMPDIR": TMP,
}

APP = "pigeon-sandbox"
APP_LABEL = "app.kubernetes.io/name"
SESSION_LABEL = "pigeon/session"  # absent from warm pods
POOL_LABEL = "pigeon/pool"  # on pods that were made warm, claimed or not
IMAGE_LABEL = "pigeon/image"
AGENT_LABEL = "pigeon/agent"
SELECTOR = f"{APP_LABEL}={APP}"

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def pod(spec: SandboxSpec, settings: KubeSettings) -> Object:
    """The pod of this sandbox; the same spec and settings always give the same object.

    Raises SandboxFailed for a name, session, image or size that cannot be had.
    """
    if not NAME.fullmatch(spec.name):
        raise SandboxFailed(f"not a name for a sandbox: {spec.name!r}")
    if spec.session is not None and not LABEL.fullmatch(spec.session):
        raise SandboxFailed(f"not a name for a session: {spec.session!r}")
    image = settings.chosen_image(spec.image)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": spec.name,
            "namespace": settings.namespace,
            "labels": _labels(spec, settings, image),
            "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
        },
        "spec": _pod_spec(spec, settings, image),
    }


def isolation(settings: KubeSettings) -> str:
    """In a few words, what keeps a session in its pod."""
    if settings.runtime_class:
        kernel = f"on {settings.runtime_class}"
    elif settings.user_namespaces:
        kernel = "in user namespaces"
    else:
        kernel = "each as a user of its own"
    return f"pods {kernel}, without rights, capabilities or credentials"


def unrestricted(made: Object) -> Object:
    """The same pod with what Pod Security `restricted` exists to refuse, to ask whether it is refused."""
    container = {**made["spec"]["containers"][0], "securityContext": {"privileged": True}}
    return {**made, "spec": {**made["spec"], "hostNetwork": True, "containers": [container]}}


def _labels(spec: SandboxSpec, settings: KubeSettings, image: str) -> Object:
    return {
        APP_LABEL: APP,
        "app.kubernetes.io/managed-by": "pigeon",
        "app.kubernetes.io/created-by": settings.created_by,
        IMAGE_LABEL: digest(image),
        AGENT_LABEL: agent_digest(),
        "pigeon/size": _size(spec, settings).name,
        **({POOL_LABEL: "warm"} if spec.session is None else {SESSION_LABEL: spec.session}),
    }


def _pod_spec(spec: SandboxSpec, settings: KubeSettings, image: str) -> Object:
    return {
        "serviceAccountName": settings.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Never",
        "activeDeadlineSeconds": spec.lifetime_seconds,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "priorityClassName": settings.warm_priority_class if spec.session is None else settings.priority_class,
        "hostname": "pigeon",
        "dnsPolicy": "None",
        # a name server is required; without one that is allowed, a query fails at once instead of timing out
        "dnsConfig": {"nameservers": list(settings.nameservers) or ["127.0.0.1"]},
        "securityContext": _pod_security(spec, settings),
        "containers": [_container(spec, settings, image)],
        "volumes": _volumes(spec, settings, image),
        **({"hostUsers": False} if settings.user_namespaces else {}),
        **({"runtimeClassName": settings.runtime_class} if settings.runtime_class else {}),
        **({"nodeSelector": dict(settings.node_selector)} if settings.node_selector else {}),
        **({"tolerations": list(settings.tolerations)} if settings.tolerations else {}),
    }


def _pod_security(spec: SandboxSpec, settings: KubeSettings) -> Object:
    return {
        "runAsNonRoot": True,
        "runAsUser": _user(spec.name, settings),
        "runAsGroup": GROUP,
        "fsGroup": GROUP,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _user(name: str, settings: KubeSettings) -> int:
    """The user id inside.

    The kernel counts RLIMIT_NPROC by user id on the whole node, so two pods of one user id would share the limit,
    and one's fork bomb would be the other's end. A user namespace or gVisor counts apart; elsewhere each pod is given a
    user id of its own.
    """
    if settings.user_namespaces or settings.runtime_class:
        return USER
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return OWN_USERS[number % len(OWN_USERS)]


def _size(spec: SandboxSpec, settings: KubeSettings) -> Size:
    return settings.size(spec.memory_bytes, spec.workspace_bytes + TMP_BYTES + RUN_BYTES)


def _container(spec: SandboxSpec, settings: KubeSettings, image: str) -> Object:
    size = _size(spec, settings)
    resources = {
        "cpu": f"{size.cpu}m",
        "memory": str(size.memory_bytes),
        "ephemeral-storage": str(size.disk_bytes),
    }
    mounts = {"workspace": WORKSPACE, "run": RUN_DIR, "tmp": TMP}
    injected = [{"name": "agent", "mountPath": AGENT, "readOnly": True}] if settings.injected(image) else []
    return {
        "name": CONTAINER,
        "image": image,
        "imagePullPolicy": settings.pull_policy,
        "command": _command(spec),
        "workingDir": WORKSPACE,
        "env": [{"name": name, "value": value} for name, value in USER_VARIABLES.items()],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "privileged": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in mounts.items()] + injected,
        "terminationMessagePolicy": "FallbackToLogsOnError",  # the last words of an agent that failed
    }


def _command(spec: SandboxSpec) -> list[str]:
    return [
        *(PYTHON, "-I", "-S", AGENT, "serve", "--socket", AGENT_SOCKET),
        *("--workspace", WORKSPACE, "--run-dir", RUN_DIR, "--grace", str(GRACE_SECONDS)),
        *("--limit", f"NPROC={spec.processes}", f"FSIZE={spec.file_bytes}", "--nice", str(NICE)),
    ]


def _volumes(spec: SandboxSpec, settings: KubeSettings, image: str) -> list[Object]:
    volumes: list[Object] = [
        {"name": "workspace", "emptyDir": {"sizeLimit": str(spec.workspace_bytes)}},
        {"name": "run", "emptyDir": {"sizeLimit": str(RUN_BYTES)}},
        {"name": "tmp", "emptyDir": {"sizeLimit": str(TMP_BYTES)}},
    ]
    if settings.injected(image):
        volumes.append({"name": "agent", "configMap": {"name": agent_config_map_name(), "defaultMode": 0o444}})
    return volumes


def agent_config_map(namespace: str) -> Object:
    """The agent for images that have none, deployed before the workers that use it; immutable, named by its hash."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": agent_config_map_name(),
            "namespace": namespace,
            "labels": {APP_LABEL: APP, "app.kubernetes.io/managed-by": "pigeon", AGENT_LABEL: agent_digest()},
        },
        "immutable": True,
        "data": {"__main__.py": _agent()},
    }


def agent_config_map_name() -> str:
    """Changes whenever the agent does, so that pods of two versions live side by side."""
    return f"pigeon-agent-{agent_digest()}"


@functools.cache
def agent_digest() -> str:
    """Which agent this worker speaks to; a label's value."""
    return digest(_agent())


@functools.cache
def _agent() -> str:
    return AGENT_SOURCE.read_text()


def digest(text: str) -> str:
    """The first 12 hexadecimal characters of the SHA-256: enough to tell versions apart, short enough for a label."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
