"""What every test may ask for."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from infra.local.sandbox_python import ensure_python
from tests.emulators.fixtures import firestore_host, project, pubsub_host

__all__ = ["firestore_host", "project", "pubsub_host", "python"]

for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:  # the tests run in the background; what they start has to hear it
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

settings.register_profile("loaded machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("loaded machine")  # being slow for a moment is no defect


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sandboxes' Python, made once for a whole test run; PIGEON_PYTHON names one that is there already."""
    known = os.environ.get("PIGEON_PYTHON")
    return Path(known) if known else ensure_python(tmp_path_factory.mktemp("python"))
