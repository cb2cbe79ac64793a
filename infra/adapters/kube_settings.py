"""What a deployment chooses about its pods and the cluster that runs them."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.errors import SandboxFailed
from schemas.limits import MIB


class Size(BaseModel):
    """What one pod may use; requests equal limits. `cpu` is in thousandths of a core, the rest in bytes.

    `memory_bytes` covers the agent, the helpers and the user's programs. `disk_bytes` covers everything written to
    the node's disk: workspace, /tmp and logs.
    """

    model_config = ConfigDict(frozen=True)

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")  # a label's value
    cpu: int = Field(gt=0)
    memory_bytes: int = Field(gt=0)
    disk_bytes: int = Field(gt=0)


SMALL = Size(name="small", cpu=250, memory_bytes=512 * MIB, disk_bytes=1024 * MIB)
LARGE = Size(name="large", cpu=1_000, memory_bytes=2048 * MIB, disk_bytes=4096 * MIB)


class KubeSettings(BaseModel):
    """One deployment's pods. The defaults run on any cluster that has our image, accounts and priority classes.

    `access` says how to reach the API server: from inside the cluster, by a kubeconfig, or by Google's credentials
    and `server` with `server_ca` (base64, as GKE tells it); "auto" takes the first of a named kubeconfig, the inside of
    a cluster, and the kubeconfig of KUBECONFIG or the home directory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    access: Literal["auto", "in-cluster", "kubeconfig", "google"] = "auto"
    kubeconfig: Path | None = None
    context: str = ""  # of the kubeconfig; "" is its current one
    server: str = ""
    server_ca: str = ""

    namespace: str = "pigeon-sandboxes"
    service_account: str = "sandbox"
    priority_class: str = "pigeon-session"
    warm_priority_class: str = "pigeon-warm"  # of the same value, so that a claimed pod is worth as much as any
    created_by: str = "pigeon"

    image: str = "pigeon/python-terminal:latest"  # of sessions that name none; has the agent unless `inject_agent`
    inject_agent: bool = False
    allowed_images: tuple[str, ...] = ()  # shell patterns of what sessions may name; these are given the agent
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    sizes: tuple[Size, ...] = (SMALL, LARGE)

    runtime_class: str = ""  # such as gvisor
    user_namespaces: bool = False  # hostUsers: false, where nodes can do that
    nameservers: tuple[str, ...] = ()  # none: no name resolution at all
    node_selector: dict[str, str] = {}
    tolerations: tuple[dict[str, Any], ...] = ()

    # after which a pod without a node gives its place back; a new node takes 120, and nobody waits for a day
    unschedulable_seconds: float = Field(180.0, gt=0, le=86_400, allow_inf_nan=False)

    def size(self, memory_bytes: int, disk_bytes: int) -> Size:
        """The smallest size with that much of both. Raises SandboxFailed where there is none."""
        fitting = [each for each in self.sizes if each.memory_bytes >= memory_bytes and each.disk_bytes >= disk_bytes]
        if not fitting:
            wanted = f"{memory_bytes // MIB} MiB of memory and {disk_bytes // MIB} MiB of disk"
            raise SandboxFailed(f"no size of sandbox has {wanted}")
        return min(fitting, key=lambda size: size.memory_bytes)

    def chosen_image(self, named: str) -> str:
        """The image to run. Raises SandboxFailed for one that is not allowed."""
        if named in ("", self.image):
            return self.image
        if not any(fnmatchcase(named, pattern) for pattern in self.allowed_images):
            raise SandboxFailed(f"the image {named!r} is not allowed here")
        return named

    def injected(self, image: str) -> bool:
        """Whether this image is given the agent of this deployment."""
        return self.inject_agent or image != self.image
