"""Google's emulators for a whole test run. Where there are none, a laptop skips and CI fails."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
import pytest_asyncio

from infra.emulators import EmulatorMissing, firestore_emulator, pubsub_emulator


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def pubsub_host() -> AsyncIterator[str]:
    """Where the Pub/Sub emulator answers."""
    try:
        async with pubsub_emulator() as host:
            yield host
    except EmulatorMissing as error:
        absent(error)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def firestore_host() -> AsyncIterator[str]:
    """Where the Firestore emulator answers."""
    try:
        async with firestore_emulator() as host:
            yield host
    except EmulatorMissing as error:
        absent(error)


@pytest.fixture
def project() -> str:
    """A project of this test's own: what others left behind neither shows nor slows it down."""
    return f"test-{uuid4().hex[:20]}"


def absent(error: EmulatorMissing) -> None:
    """Skip, or fail where the emulators have to be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(str(error))
    pytest.skip(str(error))
