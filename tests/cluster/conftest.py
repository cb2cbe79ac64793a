"""The cluster that is tried: the one that `make test-cluster` names, else this repository's own if it runs.

KUBECONFIG itself is not read: `make test` must not touch whatever cluster a shell happens to be set up for.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import pytest_asyncio

from infra.adapters.kube_settings import KubeSettings
from infra.cluster import lifecycle
from infra.cluster.__main__ import STATE
from infra.cluster.layout import Layout, cache_folder
from tests.cluster.cluster import IMAGE, Cluster, namespace
from tests.cluster.deployment import Deployment, deployed
from tests.cluster.stacks import guest, whole_stack
from tests.journeys.stack import Stack, User

NAMED = "PIGEON_TEST_KUBECONFIG"


@pytest.fixture(scope="session")
def own() -> Layout:
    """This repository's cluster, whether it runs or not."""
    return Layout(Path(__file__).parents[2].resolve() / STATE)


@pytest.fixture(scope="session")
def kubeconfig(own: Layout) -> Path:
    """The administrator's. Where there is no cluster a laptop skips, and CI fails if it could have made one."""
    named = os.environ.get(NAMED)
    if named:
        return Path(named)
    if lifecycle.is_ready(own):
        return own.kubeconfig
    return missing("no cluster: `make cluster` brings one up, KUBECONFIG=... make test-cluster tries another")


def missing(reason: str) -> NoReturn:
    """Skip, or fail where the cluster has to be there."""
    if os.environ.get("CI") == "true" and any(cache_folder().glob("*/kube")):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(kubeconfig: Path) -> Iterator[Cluster]:
    """A namespace of the run's own."""
    with namespace(kubeconfig) as found:
        yield found


@pytest.fixture(scope="session")
def settings(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> KubeSettings:
    """Of a worker in that namespace, with the rights of a deployed one."""
    path = cluster.worker_kubeconfig(tmp_path_factory.mktemp("worker") / "kubeconfig")
    image = os.environ.get("PIGEON_KUBE_IMAGE", IMAGE)
    return KubeSettings(access="kubeconfig", kubeconfig=path, namespace=cluster.namespace, image=image)


@pytest.fixture(scope="session")
def deployment(kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The whole product but the worker, under names of the run's own."""
    with deployed(kubeconfig, tmp_path_factory.mktemp("deployment")) as found:
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A whole stack with the rights of the deployed worker, for tests that leave it as they found it."""
    async with whole_stack(deployment, tmp_path_factory.mktemp("stack")) as found:
        await found.start()
        yield found


@pytest.fixture
async def alice(stack: Stack, deployment: Deployment) -> AsyncIterator[User]:
    """A signed-in user, whose sessions are closed at the end and leave no pod behind."""
    async with guest(stack, deployment, "alice") as user:
        yield user


@pytest.fixture
async def bob(stack: Stack, deployment: Deployment) -> AsyncIterator[User]:
    """Another one."""
    async with guest(stack, deployment, "bob") as user:
        yield user
