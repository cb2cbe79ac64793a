"""One namespace for the run; without KUBECONFIG there is nothing to run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.adapters.kube_settings import KubeSettings
from tests.cluster.cluster import IMAGE, Cluster, namespace


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A namespace in the cluster that KUBECONFIG names."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG names no cluster (make test-cluster)")
    with namespace(Path(os.environ["KUBECONFIG"])) as found:
        yield found


@pytest.fixture(scope="session")
def settings(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> KubeSettings:
    """Of a worker in that namespace, with the rights of a deployed one."""
    path = cluster.worker_kubeconfig(tmp_path_factory.mktemp("worker") / "kubeconfig")
    image = os.environ.get("PIGEON_KUBE_IMAGE", IMAGE)
    return KubeSettings(access="kubeconfig", kubeconfig=path, namespace=cluster.namespace, image=image)
