"""Sandboxes of this machine in trouble: killed launchers, reused pids, restarts, crowded and deep folders."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from infra.local import bubblewrap, cgroups, sandbox_plan
from infra.local.sandbox_process import Process, boot_id, descendants
from infra.local.sandbox_python import MARKER, ensure_python
from infra.local.sandbox_record import OF, Record
from infra.local.sandboxes import LocalSandboxes
from schemas.errors import SandboxFailed, SandboxGone
from schemas.limits import Limits
from schemas.ports import Phase, Sandbox
from tests.contracts.sandboxes_contract import greeting, spec, started
from tests.contracts.waiting import soon
from tests.isolation.shell import shell
from tests.waiting import until


@pytest.fixture
async def sandboxes(tmp_path: Path, python: Path) -> AsyncIterator[LocalSandboxes]:
    """A root of the test's own."""
    made = LocalSandboxes(tmp_path / "sandboxes", limits=Limits(), python=python)
    yield made
    await clear(made)


async def clear(sandboxes: LocalSandboxes) -> None:
    """Delete all there are."""
    for sandbox in await sandboxes.list():
        await sandboxes.delete(sandbox.name, sandbox.uid)


def record(tmp_path: Path, sandbox: Sandbox) -> Record:
    """A sandbox's directory."""
    return Record(tmp_path / "sandboxes" / f"{sandbox.name}{OF}{sandbox.uid}")


def process(record: Record, role: str) -> Process:
    """One of its processes."""
    found = record.process(role)
    assert found is not None
    return found


async def test_an_agent_that_is_told_to_go_says_by_what(sandboxes: LocalSandboxes, tmp_path: Path) -> None:
    """Its exit code is the signal's, as a shell would give it: somebody outside wanted it gone."""
    sandbox = await started(sandboxes, "one")
    os.kill(process(record(tmp_path, sandbox), "init").pid, 15)
    ended = await soon(sandboxes.gone("one", sandbox.uid))
    assert ended.reason == "it was killed from outside (signal 15)"


async def test_a_sandbox_ends_with_its_monitor(sandboxes: LocalSandboxes, tmp_path: Path) -> None:
    """The process outside of a sandbox holds its lifetime; nothing is left running that nobody watches."""
    sandbox = await started(sandboxes, "one")
    folder = record(tmp_path, sandbox)
    assert process(folder, "monitor").kill(10)
    assert "killed from outside" in (await soon(sandboxes.gone("one", sandbox.uid))).reason
    assert process(folder, "init").wait(10)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can do without user namespaces")
async def test_without_user_namespaces_a_sandbox_may_outlive_its_monitor_but_not_its_lifetime(
    sandboxes: LocalSandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the monitor has no right to end it; whoever looks does."""
    monkeypatch.setattr(bubblewrap, "user_namespaces", lambda uid: False)
    sandbox = await sandboxes.create(spec("one", lifetime_seconds=1))
    assert (await soon(sandboxes.gone("one", sandbox.uid))).reason == "its lifetime is over"


@pytest.mark.parametrize("unsafe", [False, True], ids=["bubblewrap", "unsafe"])
async def test_a_lifetime_ends_with_nobody_there(tmp_path: Path, python: Path, unsafe: bool) -> None:
    """A sandbox that nothing knows of any more, its directory removed, does not run for ever."""
    sandboxes = LocalSandboxes(tmp_path / "sandboxes", limits=Limits(), unsafe=unsafe, python=python)
    sandbox = await sandboxes.create(spec("one", lifetime_seconds=1))
    folder = record(tmp_path, sandbox)
    init, monitor = process(folder, "init"), process(folder, "monitor")
    folder.directory.rename(tmp_path / "out of sight")
    assert await asyncio.to_thread(init.wait, 20)
    assert await asyncio.to_thread(monitor.wait, 20)
    folder = Record(tmp_path / "out of sight")
    ended = folder.look()
    assert ended is not None
    assert (ended.phase, ended.reason) == (Phase.ENDED, "its lifetime is over")
    meta = folder.meta()
    assert meta is not None
    cgroups.remove(meta.cgroups)


async def test_a_reused_pid_is_never_mistaken(sandboxes: LocalSandboxes, tmp_path: Path) -> None:
    """A process that got the number of a sandbox that has ended is neither waited for nor killed."""
    sandbox = await started(sandboxes, "one")
    folder = record(tmp_path, sandbox)
    assert process(folder, "init").kill(10)
    stranger = await asyncio.create_subprocess_exec("sleep", "600")
    try:
        forged = {"pid": stranger.pid, "start": 1}
        folder.write("process.json", json.dumps({"boot": boot_id(), "init": forged, "monitor": forged}))
        assert (await soon(sandboxes.gone("one", sandbox.uid))).phase is Phase.ENDED
        await sandboxes.delete("one", sandbox.uid)
        assert not over(stranger.pid)
    finally:
        stranger.kill()
        await stranger.wait()


async def test_a_restart_of_the_machine_ends_every_sandbox(sandboxes: LocalSandboxes, tmp_path: Path) -> None:
    """Process numbers of another boot mean nothing, even where such a process runs."""
    sandbox = await started(sandboxes, "one")
    folder = record(tmp_path, sandbox)
    before = (folder.directory / "process.json").read_text()
    folder.write("process.json", before.replace(boot_id(), "another boot"))
    ended = await sandboxes.get("one")
    assert ended is not None
    assert (ended.phase, ended.reason) == (Phase.ENDED, "the machine was started anew")
    folder.write("process.json", before)


async def test_a_launch_that_was_cut_short_has_ended(sandboxes: LocalSandboxes, tmp_path: Path) -> None:
    """A creator killed between naming and starting leaves a sandbox that can be seen and removed."""
    sandbox = await started(sandboxes, "one", "s")
    folder = record(tmp_path, sandbox)
    assert process(folder, "init").kill(10)
    (folder.directory / "process.json").unlink()
    ended = await soon(sandboxes.gone("one", sandbox.uid))
    assert "cut short" in ended.reason
    with pytest.raises(SandboxGone, match="cut short"):
        await soon(sandboxes.running("one", sandbox.uid))
    await sandboxes.delete("one", sandbox.uid)
    assert await sandboxes.list() == []


async def test_a_launcher_killed_half_way_leaves_nothing_running(sandboxes: LocalSandboxes, tmp_path: Path) -> None:
    """Even a sandbox whose first process nobody wrote down is ended, by way of its monitor."""
    sandbox = await started(sandboxes, "one", "s")
    folder = record(tmp_path, sandbox)
    init = process(folder, "init")
    known = json.loads((folder.directory / "process.json").read_text())
    folder.write("process.json", json.dumps({"boot": known["boot"], "monitor": known["monitor"]}))
    ended = await sandboxes.get("one")
    assert ended is not None
    assert "cut short" in ended.reason
    assert not init.alive()


async def test_what_a_killed_process_left_is_cleared_away(sandboxes: LocalSandboxes, tmp_path: Path) -> None:
    """A creator or deleter that is killed half way fills no disk for ever."""
    left = tmp_path / "sandboxes" / f".{'0' * 32}"
    left.mkdir(parents=True)
    (left / "file").touch()
    await sandboxes.create(spec("one"))
    assert not left.exists()


async def test_an_interpreter_that_does_not_work_leaves_nothing(tmp_path: Path) -> None:
    """A sandbox that cannot be started is refused with the cause, and is not there afterwards."""
    broken = tmp_path / "bin" / "python3"
    broken.parent.mkdir()
    broken.symlink_to("/nowhere/python3")
    sandboxes = LocalSandboxes(tmp_path / "sandboxes", limits=Limits(), python=broken)
    with pytest.raises(SandboxFailed, match="does not work"):
        await sandboxes.create(spec("one"))
    assert await sandboxes.list() == []


async def test_an_agent_that_crashes_at_once_is_a_failed_sandbox(
    sandboxes: LocalSandboxes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for it to run is told what it said, instead of waiting."""
    crashing = tmp_path / "agent.py"
    crashing.write_text("raise SystemExit('no agent today')")
    monkeypatch.setattr(sandbox_plan, "AGENT", crashing)
    sandbox = await sandboxes.create(spec("one"))
    with pytest.raises(SandboxFailed, match="no agent today"):
        await soon(sandboxes.running("one", sandbox.uid))
    with pytest.raises(SandboxFailed):
        await sandboxes.connect("one", sandbox.uid)


async def test_a_deep_root_works(tmp_path: Path, python: Path) -> None:
    """A Unix socket's address has 108 bytes; a folder's path may have many more."""
    sandboxes = LocalSandboxes(tmp_path.joinpath(*["a-long-name-for-a-folder"] * 8), limits=Limits(), python=python)
    try:
        assert await greeting(sandboxes, await started(sandboxes, "one"))
    finally:
        await clear(sandboxes)


async def test_nothing_is_kept_open(sandboxes: LocalSandboxes) -> None:
    """A worker that has seen many sandboxes come and go has no more descriptors or children than before."""
    others = set(descendants(os.getpid()))  # a browser or an emulator of other tests
    for turn in range(4):
        sandbox = await started(sandboxes, "one")
        await greeting(sandboxes, sandbox)
        await sandboxes.delete("one", sandbox.uid)
        if turn == 0:
            before = len(os.listdir("/proc/self/fd"))
    assert len(os.listdir("/proc/self/fd")) == before
    assert set(descendants(os.getpid())) <= others


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives every sandbox a user of its own")
async def test_every_sandbox_of_root_has_a_user_of_its_own(sandboxes: LocalSandboxes, tmp_path: Path) -> None:
    """Even if two sandboxes could reach each other, one could not harm the other."""
    made = await asyncio.gather(*(started(sandboxes, f"n{each}") for each in range(3)))
    users = {status(process(record(tmp_path, each), "init").pid)["Uid"] for each in made}
    assert len(users) == 3
    assert "0" not in {user for each in users for user in each.split()}


async def test_cgroups_go_with_their_sandbox(sandboxes: LocalSandboxes, tmp_path: Path) -> None:
    """No limit stays behind on the machine."""
    sandbox = await started(sandboxes, "one")
    meta = record(tmp_path, sandbox).meta()
    assert meta is not None
    assert len(meta.cgroups) == len(cgroups.directories("any"))
    assert all(map(os.path.isdir, meta.cgroups))
    await sandboxes.delete("one", sandbox.uid)
    assert not any(map(os.path.exists, meta.cgroups))


async def test_without_a_sandbox_nothing_stays_either(tmp_path: Path, python: Path) -> None:
    """Processes that a session without a sandbox put into the background end with it."""
    sandboxes = LocalSandboxes(tmp_path / "sandboxes", limits=Limits(), unsafe=True, python=python)
    sandbox = await started(sandboxes, "one")
    async with shell(sandboxes, sandbox) as opened:
        await opened.run("setsid sh -c 'echo $$ > pid; exec sleep 600' & until [ -s pid ]; do sleep 0.01; done")
        pid = int(await opened.read("pid"))
    assert not over(pid)
    await sandboxes.delete("one", sandbox.uid)

    async def ended() -> bool:
        return over(pid)

    assert await until(ended, "the process in the background has ended")


def status(pid: int) -> dict[str, str]:
    """What the kernel tells of a process; nothing of one that is not there."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def over(pid: int) -> bool:
    """Whether a process has ended, be it reaped or not."""
    return status(pid).get("State", "")[:1] in ("", "Z", "X")


async def test_a_sandbox_that_is_gone_is_told_from_one_that_failed(sandboxes: LocalSandboxes, tmp_path: Path) -> None:
    """What lived in a killed sandbox is lost; trying again is worth it."""
    sandbox = await started(sandboxes, "one")
    assert process(record(tmp_path, sandbox), "init").kill(10)
    with pytest.raises(SandboxGone):
        await soon(sandboxes.running("one", sandbox.uid))


@pytest.mark.slow
def test_an_environment_that_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    """A kill in the middle of the first start breaks no later start."""
    half = tmp_path / "python"
    (half / "bin").mkdir(parents=True)
    (half / "left-over").touch()
    python = ensure_python(tmp_path)
    assert subprocess.run([python, "-c", "import pip"], check=False).returncode == 0
    assert not (half / "left-over").exists()
    assert (half / MARKER).exists()
    made = (half / "pyvenv.cfg").stat().st_mtime_ns
    assert ensure_python(tmp_path) == python
    assert (half / "pyvenv.cfg").stat().st_mtime_ns == made


async def test_a_launch_that_fails_leaves_nothing(
    sandboxes: LocalSandboxes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sandbox that could not be started is refused at once, with the launcher's words, and is not there."""
    missing = bubblewrap.find_bwrap().with_name("no-such-bwrap")
    monkeypatch.setattr(bubblewrap, "find_bwrap", lambda: missing)
    with pytest.raises(SandboxFailed, match="No such file"):
        await sandboxes.create(spec("one"))
    assert await sandboxes.list() == []
    assert [name for name in os.listdir(tmp_path / "sandboxes") if name != ".lock"] == []
