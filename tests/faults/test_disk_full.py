"""The store's disk fills up: a clear refusal, nothing half-written, and it goes on when there is room again."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.journeys.conftest import MakeStack
from tests.journeys.stack import User

DISK_BYTES = 24 * 1024 * 1024
MAX_REQUESTS = 2_000  # each writes a little; long before this many the disk is really full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 24 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = f"size={DISK_BYTES},mode=0700"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        assert not os.environ.get("CI"), f"CI has to mount a small disk: {mounted.stderr.decode()}"
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Take all the room that is left."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


async def _refused(user: User) -> tuple[int, dict[str, object], list[str]]:
    """Ask for sessions until one is refused; returns the refusal and the sessions made until then."""
    made: list[str] = []
    for number in range(MAX_REQUESTS):
        response = await user.http.post(user.url("create-session"), json={"requestId": f"r{number}"})
        if response.status_code == 503:
            assert int(response.headers["retry-after"]) > 0
            return 503, response.json(), made
        assert response.status_code == 202, response.text
        made.append(response.json()["sessionId"])
    raise AssertionError("the disk never filled up")


@pytest.mark.slow
async def test_a_full_disk_refuses_and_loses_nothing(make_stack: MakeStack, small_disk: Path) -> None:
    """503 with a stable code; sessions that live go on where they were; nothing of a refused one is kept."""
    limits = '{"capacity": 1, "pool_size": 0, "sessions_per_user": 5000}'
    stack = make_stack(PIGEON_LIMITS=limits)
    stack.state = small_disk / "state"
    stack.state.mkdir()
    await stack.start()
    async with stack.user() as alice, stack.user("bob") as bob:
        session = await alice.ready()
        filler = fill(small_disk)
        _, problem, made = await _refused(bob)
        assert problem["code"] == "store_unavailable"
        filler.unlink()
        assert (await alice.run(session, "echo again"))[1] == b"again\r\n"
        listed = (await bob.call("GET", "list-sessions", expect=200, params={"limit": "100"}))["sessions"]
        assert [entry["sessionId"] for entry in listed] == made[::-1][:100]
        await alice.call("DELETE", f"cleanup-session/{session}")
        output = await alice.transcript(session)
        assert output.end is not None
        assert not output.gaps
