"""One running stack for every test that leaves it as it found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.pigeon import Pigeon


@pytest.fixture(scope="session")
def pigeon(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Iterator[Pigeon]:
    """`pigeon` on a running stack."""
    command = Pigeon(tmp_path_factory.mktemp("state"), PIGEON_PYTHON=str(python))
    with command.up():
        yield command


@pytest.fixture
def fresh(tmp_path: Path, python: Path) -> Pigeon:
    """`pigeon` on a state folder of the test's own, on which nothing runs."""
    return Pigeon(tmp_path / "state", PIGEON_PYTHON=str(python))
