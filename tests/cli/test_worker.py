"""`pigeon worker`: one of several processes that work on the same sessions."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx
import pytest

from tests.cli.pigeon import Background, Pigeon

pytestmark = pytest.mark.slow

SLOW = b"import time\nfor number in range(40):\n    print(number, flush=True)\n    time.sleep(0.1)\n"


@pytest.fixture
def pigeon(tmp_path: Path, python: Path) -> Pigeon:
    """`pigeon` on a state folder of the test's own; each worker takes a free port for its probes."""
    return Pigeon(tmp_path / "state", PIGEON_PYTHON=str(python), PIGEON_HEALTH_PORT="0")


def probes(worker: Background) -> str:
    """Where a started worker answers probes: the second line it prints."""
    assert worker.line().startswith(b"Isolation: ")
    return worker.line().decode().split()[-1]


def test_a_worker_answers_probes_and_stops_on_sigterm(pigeon: Pigeon) -> None:
    """Kubernetes knows when it may be counted on, and it ends in good order."""
    with pigeon.up("--roles", "gateway,ticker"), pigeon.background("worker") as worker:
        ready = probes(worker)
        assert httpx.get(ready, trust_env=False).status_code == 200
        assert httpx.get(ready.replace("readyz", "healthz"), trust_env=False).status_code == 200
        worker.signal(signal.SIGTERM)
        assert worker.end().returncode == 0


def test_a_stopped_worker_hands_its_sessions_to_another(pigeon: Pigeon) -> None:
    """A rolling update in the middle of a program: the program and its output go on, without a gap."""
    with pigeon.up("--roles", "gateway,ticker"), pigeon.background("worker") as first:
        probes(first)
        with pigeon.background("run", "-", stdin=SLOW) as running:
            assert running.line() == b"0\n"
            with pigeon.background("worker") as second:
                probes(second)
                first.signal(signal.SIGTERM)
                assert first.end().returncode == 0
                ended = running.end()
                second.signal(signal.SIGTERM)
                second.end()
    assert ended.returncode == 0
    assert [int(line) for line in ended.stdout.split()] == list(range(1, 40))


def test_a_worker_without_its_deployment_says_what_is_missing(pigeon: Pigeon) -> None:
    """It ends, and its last line names what is not there."""
    pigeon.environment |= {"PIGEON_PROFILE": "gcp", "PIGEON_WORKER_SECRET": "short"}
    pigeon.environment.pop("GOOGLE_APPLICATION_CREDENTIALS", None)
    ended = pigeon.run("worker")
    assert ended.returncode == 1
    said = ended.stderr.splitlines()[-1]
    assert b"PIGEON_WORKER_SECRET" in said or b"credentials" in said
