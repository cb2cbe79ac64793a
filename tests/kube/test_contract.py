"""Pods keep the contract of Sandboxes, on the small API server."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from infra.adapters.kube_settings import KubeSettings
from infra.local import sandbox_process
from infra.local.sandbox_record import OF, Record
from schemas.ports import Sandbox
from tests.contracts.sandboxes_contract import CAPACITY, SandboxesContract
from tests.contracts.test_sandboxes import exists
from tests.kube.lab import KubeLab, kube_lab
from tests.kube.server import ApiServer


class LocalNode:
    """The node of the small API server: this machine."""

    def __init__(self, api: ApiServer, root: Path) -> None:
        self._api = api
        self._root = root

    async def kill(self, sandbox: Sandbox) -> None:
        """See Node."""
        await self._api.kubelet.kill(sandbox.name)

    async def traces(self, sandbox: Sandbox) -> set[str]:
        """See Node."""
        local = self._api.kubelet.find(sandbox.name).sandbox
        assert local is not None
        record = Record(self._root / f"{local.name}{OF}{local.uid}")
        meta, monitor = record.meta(), record.process("monitor")
        assert meta is not None
        assert monitor is not None
        pids = [monitor.pid, *sandbox_process.descendants(monitor.pid)]
        return {str(record.directory), *(f"/proc/{pid}" for pid in pids), *filter(os.path.exists, meta.cgroups)}

    async def still_there(self, traces: set[str]) -> set[str]:
        """See Node."""
        return set(filter(exists, traces))


@pytest.fixture
async def lab(api: ApiServer, tmp_path: Path, settings: KubeSettings) -> AsyncIterator[KubeLab]:
    """An empty namespace with room for CAPACITY sessions, and warm pods apart."""
    api.put_quota("sessions", {"pods": str(CAPACITY)}, priorities=[settings.priority_class])
    async with kube_lab(settings, LocalNode(api, tmp_path / "node")) as lab:
        yield lab


class TestPods(SandboxesContract):
    """The contract."""
