"""Pods keep the contract of Sandboxes, on a real cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from infra.adapters.kube_settings import KubeSettings
from tests.cluster.cluster import Cluster, MachineNode
from tests.contracts.sandboxes_contract import SandboxesContract
from tests.kube.lab import KubeLab, kube_lab

pytestmark = pytest.mark.slow


@pytest.fixture
async def lab(cluster: Cluster, settings: KubeSettings) -> AsyncIterator[KubeLab]:
    """The empty namespace."""
    async with kube_lab(settings, MachineNode(cluster)) as lab:
        yield lab


class TestCluster(SandboxesContract):
    """The contract."""
