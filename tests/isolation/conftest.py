"""Sandboxes of a user of one's choice: as root, and as a plain user."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
PLAIN_USER = 61_184  # a user id that no account has
PACKAGES = [path for path in sys.path if path.endswith("-packages")]

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class House:
    """A user, the interpreter that user can reach, and a folder of that user's for sandboxes."""

    user: int
    interpreter: str
    state: Path
    user_namespaces: bool = True

    def run(
        self, script: Path, arguments: Any = None, *, network: str = "none", seconds: float = 60.0
    ) -> dict[str, Any]:
        """Run a script in a sandbox of this user's own; see tests/isolation/driver.py for the answer."""
        request = {
            "root": str(self.state / "sandboxes"),
            "name": f"n{next(_numbers)}",
            "script": script.read_text(),
            "arguments": arguments,
            "network": network,
            "user_namespaces": self.user_namespaces,
            "seconds": seconds,
        }
        done = self.python("-m", "tests.isolation.driver", input=json.dumps(request), timeout=seconds + 60)
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def python(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run Python as this user, with the repository on its path."""
        environment = {
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *PACKAGES]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PATH": os.environ["PATH"],
            "SECRET_OF_THE_HOST": "from the environment",
        }
        return subprocess.run(
            [self.interpreter, *words],
            user=self.user,
            group=self.user,
            extra_groups=[] if os.geteuid() == 0 else None,
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            **options,
        )


def impossible(reason: str) -> None:
    """Skip on a laptop; in CI a promise that was not tried is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def roots_house() -> Iterator[House]:
    """Sandboxes of root."""
    if os.geteuid() != 0:
        impossible("only root can try what root's sandboxes keep out")
    with built(0, sys.executable) as house:
        yield house


@pytest.fixture(scope="session")
def roots_house_without_user_namespaces(roots_house: House) -> House:
    """Sandboxes of root where a plain user may make no user namespace."""
    return replace(roots_house, user_namespaces=False)


@pytest.fixture(scope="session")
def plain_users_house() -> Iterator[House]:
    """Sandboxes of a user without any right."""
    user = os.geteuid() or PLAIN_USER
    with built(user, sys.executable if os.geteuid() else reachable(user)) as house:
        yield house


@pytest.fixture(
    params=["roots_house", "plain_users_house", "roots_house_without_user_namespaces"],
    ids=["root", "plain user", "root without user namespaces"],
)
def house(request: pytest.FixtureRequest) -> House:
    """One after the other: each is kept from the same things."""
    found: House = request.getfixturevalue(request.param)
    return found


@contextmanager
def built(user: int, interpreter: str) -> Iterator[House]:
    """A house with an environment for its sandboxes."""
    state = Path(tempfile.mkdtemp(prefix="pigeon-isolation-"))
    house = House(user, interpreter, state)
    try:
        os.chown(state, user, -1)
        made = house.python("-c", f"from infra.local.sandbox_python import *; ensure_python(Path({str(state)!r}))")
        assert made.returncode == 0, made.stderr
        yield house
    finally:
        shutil.rmtree(state)


def reachable(user: int) -> str:
    """An interpreter that this user can run with our packages; skips where there is none."""
    for candidate in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}", "/usr/bin/python3"):
        try:
            if House(user, candidate, Path("/")).python("-c", "import infra.local.sandboxes").returncode == 0:
                return candidate
        except OSError:
            continue
    impossible("no interpreter that a plain user can reach")
    raise AssertionError
