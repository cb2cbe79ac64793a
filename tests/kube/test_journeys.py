"""The journeys of a person, with pods for sandboxes: the same promises, another runtime."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.journeys.conftest import MakeStack, make_stack
from tests.journeys.stack import Stack, User
from tests.journeys.test_session import *  # noqa: F403 - every journey, none left out
from tests.kube.server import ApiServer

__all__ = ["make_stack"]


@pytest.fixture
async def stack(api: ApiServer, make_stack: MakeStack, tmp_path: Path) -> Stack:
    """A whole stack whose sandboxes are pods of the small API server, which outlives it."""
    config = api.kubeconfig(tmp_path / "kubeconfig")
    whole = make_stack(
        PIGEON_SANDBOXES="kubernetes", PIGEON_KUBE_ACCESS="kubeconfig", PIGEON_KUBE_KUBECONFIG=str(config)
    )
    await whole.start()
    return whole


@pytest.fixture
async def alice(stack: Stack) -> AsyncIterator[User]:
    """A signed-in user."""
    async with stack.user("alice") as user:
        yield user
