"""A server of its own for every test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from infra.adapters.kube_settings import KubeSettings
from tests.kube.server import ApiServer


@pytest.fixture
async def api(tmp_path: Path, python: Path) -> AsyncIterator[ApiServer]:
    """An API server with TLS; every pod that is left is ended with it."""
    async with ApiServer(tmp_path / "node", python=python).serving() as server:
        yield server


@pytest.fixture
def settings(api: ApiServer, tmp_path: Path) -> KubeSettings:
    """Of a worker that may use the API server."""
    return KubeSettings(access="kubeconfig", kubeconfig=api.kubeconfig(tmp_path / "kubeconfig"))
