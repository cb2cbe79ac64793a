"""What user code can use up is its own sandbox, and nothing more."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.local import bubblewrap, sandbox_plan
from schemas.limits import MIB
from tests.isolation import bombs
from tests.isolation.conftest import House
from tests.isolation.driver import spec

pytestmark = pytest.mark.slow
BOMBS = Path(bombs.__file__)
SIZES = {  # of every place that can be written to
    bubblewrap.WORKSPACE: spec("any").workspace_bytes,
    "/tmp": bubblewrap.TMP_BYTES,
    "/dev/shm": bubblewrap.SHM_BYTES,
    bubblewrap.RUN_DIR: sandbox_plan.RUN_BYTES,
}


def test_a_fork_bomb_stops_at_its_limit(house: House) -> None:
    """The sandbox's processes are counted; its shell and its worker go on."""
    answer = house.run(BOMBS, ["fork"])
    assert answer["result"]["refused"] == "EAGAIN"
    assert answer["result"]["reached"] < spec("any").processes
    assert answer["phase"] == "running"


def test_a_process_that_takes_all_memory_dies_alone(house: House) -> None:
    """One greedy process does not take its session along."""
    answer = house.run(BOMBS, ["memory"])
    assert answer["result"] == {"refused": True}
    assert answer["phase"] == "running"


def test_memory_without_a_name_is_counted(house: House) -> None:
    """Files that exist in memory only are bounded, or not to be had."""
    answer = house.run(BOMBS, ["anonymous files"])
    if limited(house):
        assert answer["result"] is None or answer["result"]["refused"]
    else:
        assert answer["result"] == {"reached": 0, "refused": "EPERM"}


@pytest.mark.parametrize("folder", SIZES)
def test_every_writable_place_is_full_at_its_size(folder: str, house: House) -> None:
    """No sandbox fills the machine's memory or disk, and a full disk ends no session."""
    answer = house.run(BOMBS, ["disk", folder])
    assert answer["result"]["refused"] == "ENOSPC"
    assert answer["result"]["reached"] <= SIZES[folder] / MIB
    assert answer["phase"] == "running"


def test_a_file_has_a_largest_size(house: House) -> None:
    """One file never takes a whole place."""
    answer = house.run(BOMBS, ["disk", "/tmp"])
    assert answer["result"]["files"] >= bubblewrap.TMP_BYTES // spec("any").file_bytes


@pytest.mark.parametrize("folder", ["/workspace", "/tmp"])
def test_empty_files_are_bounded(folder: str, house: House) -> None:
    """Empty files take memory, too; where a cgroup counts it, the sandbox pays."""
    if not limited(house):
        pytest.skip("without a cgroup only the kernel's own limit of a memory file system bounds them")
    answer = house.run(BOMBS, ["inodes", folder], seconds=120)
    if answer["phase"] == "running":
        assert answer["result"] is None or answer["result"].get("refused")
    else:
        assert "out of memory" in answer["reason"]


def test_memory_taken_by_many_processes_ends_at_most_its_sandbox(house: House) -> None:
    """A sandbox that is out of memory says so, whatever else becomes of it."""
    if not limited(house):
        pytest.skip("without a cgroup memory is limited for each process, not in all")
    answer = house.run(BOMBS, ["many"], seconds=8)
    assert answer["phase"] == "running" or "out of memory" in answer["reason"]


def limited(house: House) -> bool:
    """Whether cgroups count what this user's sandboxes take."""
    script = "from infra.local import cgroups; print(len(cgroups.directories('any')))"
    return house.python("-c", script).stdout != "0\n"
