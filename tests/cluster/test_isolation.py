"""What a session is kept from in its pod, tried by commands that were typed into it."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
import yaml  # type: ignore[import-untyped]

from tests.cluster import inside
from tests.cluster.deployment import Deployment
from tests.cluster.stacks import do, guest, pull, push
from tests.isolation import attempts
from tests.isolation.conftest import House
from tests.isolation.test_attempts import host, listening
from tests.journeys.stack import Stack, User

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
SHARED = ("user", "cgroup")  # namespaces that a pod has of its own only where the deployment or the machine asks for it
LISTENER_PORT = 8080
LISTEN = f"python3 -m http.server {LISTENER_PORT} >/dev/null 2>&1 &"
REACHED = "until (exec 3<>/dev/tcp/{address}/{port}) 2>/dev/null; do sleep 0.1; done; echo reached"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def outcomes(
    stack: Stack, deployment: Deployment, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, str]]:
    """How every attempt went: one session is enough for all of them."""
    async with guest(stack, deployment, "mallory") as mallory, guest(stack, deployment, "victim") as victim:
        target = await listener(victim, deployment)
        session = await mallory.ready()
        user = deployment.pod(session)["spec"]["securityContext"]["runAsUser"]
        with node(tmp_path_factory.mktemp("node"), user, deployment) as given:
            given["targets"]["another session"] = target
            yield await tried(mallory, session, given)


async def listener(victim: User, deployment: Deployment) -> tuple[str, int]:
    """Where another session listens; it reaches its own address."""
    session = await victim.ready()
    address = deployment.pod(session)["status"]["podIP"]
    await do(victim, session, LISTEN)
    assert await do(victim, session, REACHED.format(address=address, port=LISTENER_PORT)) == (0, b"reached\r\n")
    return address, LISTENER_PORT


async def tried(mallory: User, session: str, given: dict[str, Any]) -> dict[str, str]:
    """Run the attempts as the user would, by typing a command."""
    paths = [Path(module.__file__ or "").relative_to(REPOSITORY) for module in (inside, attempts)]
    files = {str(path): (REPOSITORY / path).read_bytes() for path in paths}
    await push(mallory, session, {**files, "arguments.json": json.dumps(given).encode()})
    code, output = await do(mallory, session, "PYTHONPATH=/workspace python3 -B -m tests.cluster.inside")
    assert (code, output) == (0, b"")
    results: dict[str, str] = json.loads(await pull(mallory, session, "result.json"))
    return results


@contextmanager
def node(folder: Path, user: int, deployment: Deployment) -> Iterator[dict[str, Any]]:
    """Things of this machine, which may be the node, of the very user id that the session has; and addresses."""
    house = House(user if os.geteuid() == 0 else os.geteuid(), sys.executable, folder, user_namespaces=False)
    with host(house) as given, listening(socket.AF_INET, ("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            assert connection.recv(5) == b"hello"
        namespaces = {name: number for name, number in given["namespaces"].items() if name not in SHARED}
        yield {**given, "namespaces": namespaces, "targets": targets(deployment, port)}


def targets(deployment: Deployment, port: int) -> dict[str, tuple[str, int]]:
    """Where a pod might find what it must not reach, by this cluster's own addresses."""
    kubectl = deployment.sandboxes.kubectl
    config = yaml.safe_load(kubectl("config", "view", "--minify"))
    server = urlsplit(config["clusters"][0]["cluster"]["server"])
    api_port = server.port or 443
    service = kubectl("get", "service", "kubernetes", "-n", "default", "-o", "jsonpath={.spec.clusterIP}")
    addresses = json.loads(kubectl("get", "nodes", "-o", "json"))["items"][0]["status"]["addresses"]
    (address,) = [each["address"] for each in addresses if each["type"] == "InternalIP"]
    return {
        "the API server's service": (service, 443),
        "kubernetes.default": ("kubernetes.default.svc.cluster.local", 443),
        "the API server where its administrator reaches it": (str(server.hostname), api_port),
        "the API server on the node": (address, api_port),
        "the node's kubelet": (address, 10250),
        "the node's kubelet, where it asks for no proof": (address, 10255),
        "etcd on the node": (address, 2379),
        "a server on the node": (address, port),
        "the metadata server": ("169.254.169.254", 80),
        "the metadata server of GKE": ("169.254.169.252", 988),
        "the metadata server by its name": ("metadata.google.internal", 80),
    }


@pytest.fixture(scope="module")
def old_runtime(deployment: Deployment) -> bool:
    """Whether a node's container runtime has a default seccomp profile from before 2.0."""
    nodes = json.loads(deployment.sandboxes.kubectl("get", "nodes", "-o", "json"))["items"]
    runtimes = [each["status"]["nodeInfo"]["containerRuntimeVersion"] for each in nodes]
    return any(each.startswith("containerd://1.") for each in runtimes)


@pytest.mark.parametrize("name", [*inside.ATTEMPTS, *inside.DIALLED])
def test_a_session_is_kept_from(name: str, outcomes: dict[str, str], old_runtime: bool) -> None:
    """Nothing that is typed into a session reaches the node, the cluster, a neighbour or a credential."""
    if old_runtime and name in inside.OLD_RUNTIMES:
        pytest.skip("containerd 1's default seccomp profile lets it through")
    assert outcomes[name].startswith("kept out"), outcomes[name]
