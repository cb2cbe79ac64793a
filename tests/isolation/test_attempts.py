"""What user code is kept from, one attempt a test, in sandboxes of root and of a plain user."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.isolation import attempts
from tests.isolation.conftest import House

NAMESPACES = ("user", "pid", "ipc", "uts", "cgroup", "net", "mnt")


@contextmanager
def listening(family: int, address: Any) -> Iterator[socket.socket]:
    """A socket of the host that greets whoever connects."""

    def greet() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(b"hello")

    with socket.socket(family) as listener:
        listener.bind(address)
        listener.listen()
        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        yield listener
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@contextmanager
def host(house: House) -> Iterator[dict[str, Any]]:
    """Things of the host that a sandbox must not reach: those of the very user whose sandbox it is."""
    secret = house.state / "secret"
    secret.write_text("of the host")
    secret.chmod(0o644)
    victim = subprocess.Popen(["sleep", "600"], user=house.user)
    namespaces = NAMESPACES if house.user_namespaces else NAMESPACES[1:]
    abstract = f"pigeon-test-{os.getpid()}-{house.user}"
    try:
        with listening(socket.AF_INET, ("127.0.0.1", 0)) as port, listening(socket.AF_UNIX, f"\0{abstract}"):
            yield {
                "secret_file": str(secret),
                "sandboxes": str(house.state / "sandboxes"),
                "pid": victim.pid,
                "port": port.getsockname()[1],
                "abstract": abstract,
                "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in namespaces},
            }
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@pytest.fixture(scope="session")
def known() -> dict[House, dict[str, str]]:
    """How every attempt went, by house: one sandbox each is enough for all of them."""
    return {}


@pytest.fixture
def outcomes(house: House, known: dict[House, dict[str, str]]) -> dict[str, str]:
    """How every attempt of this user's went, by its name."""
    if house not in known:
        with host(house) as given:
            answer = house.run(Path(attempts.__file__), given)
        assert answer["result"], answer
        assert answer["phase"] == "running"
        known[house] = answer["result"]
    return known[house]


@pytest.mark.parametrize("name", attempts.ATTEMPTS)
def test_user_code_is_kept_from(name: str, outcomes: dict[str, str]) -> None:
    """Nothing a sandbox does reaches the host, a neighbour or a credential."""
    assert outcomes[name].startswith("kept out"), outcomes[name]
