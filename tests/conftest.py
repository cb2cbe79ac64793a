"""What every test may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.local.sandbox_python import ensure_python


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sandboxes' Python, made once for a whole test run."""
    return ensure_python(tmp_path_factory.mktemp("python"))
