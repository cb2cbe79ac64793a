"""A house a test; the sandboxes' Python is made once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.consumers.house import House, house


@pytest.fixture
async def empty_house(tmp_path: Path, python: Path) -> AsyncIterator[House]:
    """A deployment without a worker: a test calls the handlers itself."""
    async with house(tmp_path / "state", python) as opened:
        yield opened


@pytest.fixture
async def staffed(empty_house: House) -> House:
    """A deployment with one worker."""
    await empty_house.hire()
    return empty_house
