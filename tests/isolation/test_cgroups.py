"""Finding, limiting and reading cgroups of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.local import cgroups


def unified(folder: Path, **enabled: str) -> Path:
    """A cgroup v2 tree: a folder for each name, nested in order, with the controllers its children have."""
    for name, controllers in enabled.items():
        folder = folder / name
        folder.mkdir()
        (folder / "cgroup.subtree_control").write_text(controllers)
        (folder / "cgroup.procs").touch()
    return folder


def test_the_nearest_delegated_cgroup_is_used(tmp_path: Path) -> None:
    """A process's own cgroup cannot have limited children while it is in there; one above it can."""
    own = unified(tmp_path, top="cpu memory pids", app="cpu memory pids", session="")
    assert cgroups.delegated(own) == own.parent


def test_without_both_controllers_there_is_none(tmp_path: Path) -> None:
    """Half a limit is none."""
    assert cgroups.delegated(unified(tmp_path, top="cpu memory", own="")) is None


def test_version_2_names_its_own_cgroup() -> None:
    """The unified hierarchy's line of /proc/self/cgroup, seen through its mount."""
    mounts = "31 23 0:27 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
    found = cgroups.own("0::/user.slice/session.scope\n", mounts)
    assert found == {"": Path("/sys/fs/cgroup/user.slice/session.scope")}


def test_version_1_names_one_for_each_controller() -> None:
    """A mount may show only a part of its hierarchy, as in a container."""
    mounts = (
        "35 30 0:30 /box /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "36 30 0:31 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
        "37 30 0:32 /other /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    )
    found = cgroups.own("9:memory:/box/inner\n8:pids:/\n7:cpu,cpuacct:/elsewhere\n", mounts)
    assert found == {"memory": Path("/sys/fs/cgroup/memory/inner"), "pids": Path("/sys/fs/cgroup/pids")}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("memory.events", "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n"),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
    ],
)
def test_kills_for_lack_of_memory_are_counted(tmp_path: Path, name: str, content: str) -> None:
    """Both versions tell, in files of their own."""
    (tmp_path / name).write_text(content)
    assert cgroups.oom_kills(["/nowhere", str(tmp_path)]) == 2


def test_removing_what_is_gone_is_fine(tmp_path: Path) -> None:
    """Two processes may remove one sandbox."""
    cgroups.remove([str(tmp_path / "none")])
    (tmp_path / "one").mkdir()
    cgroups.remove([str(tmp_path / "one")])
    assert not (tmp_path / "one").exists()
