"""How an agent ends: with its shell, by a stop, by SIGTERM, and never before its output is safe."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from consumers.agent import agent as wire
from tests.agent.client import AGENT, PYTHON, AgentProcess, RequestRefused, Terminal, agent, program_runs, wait_until

NOBODY = 65534
TERMINATED = 143  # 128 + SIGTERM: a node that evicts a pod tells why only of one that did not seem to be done


def gone(process: AgentProcess) -> int:
    """Wait until the agent has exited; returns its exit code."""
    return process.process.wait(20)


def test_a_typed_exit_ends_the_session(terminal: Terminal) -> None:
    """When the shell is gone the stream ends with its code, and the agent leaves once all is recorded."""
    terminal.stream.until_text(b"$ ")
    terminal.control.input(b"exit 5\r")
    assert terminal.stream.until_end() == "ended"
    assert terminal.stream.marks[-1]["exitCode"] == 5
    assert terminal.stream.marks[-1]["offset"] == terminal.stream.position
    assert gone(terminal.process) == 0


def test_the_agent_stays_until_the_end_is_recorded(terminal: Terminal) -> None:
    """Nobody has committed the last bytes: they can still be read, by whoever comes."""
    terminal.stream.acking = False
    terminal.submit("echo precious; exit")
    terminal.stream.until_mark("ended")
    terminal.stream.connection.close()
    reader = terminal.process.attach(epoch=2)
    reader.until_text(b"\nprecious\r\n")
    assert reader.until_end() == "ended"
    assert gone(terminal.process) == 0


def test_the_agent_does_not_wait_for_ever(tmp_path: Path) -> None:
    """When nobody ever records the end it leaves after its linger time."""
    with agent(tmp_path, "--linger", "0.2") as process:
        terminal = Terminal(process)
        terminal.stream.acking = False
        terminal.submit("exit")
        assert gone(process) == 0


@pytest.mark.parametrize("background", ["sleep 300 &", "(trap '' HUP TERM; exec sleep 300) & disown;"])
def test_a_background_job_does_not_outlive_the_shell(terminal: Terminal, background: str) -> None:
    """What the shell leaves behind is ended with it, and its hold on the terminal delays nothing."""
    terminal.run(f"{background} echo $! >pid")
    pid = int((terminal.process.workspace / "pid").read_text())
    terminal.submit("exit 0")
    assert terminal.stream.until_end() == "ended"
    assert gone(terminal.process) == 0
    assert wire.process_state(pid)[0] in ("", "Z")


def test_the_shell_ends_while_another_job_holds_the_terminal(terminal: Terminal) -> None:
    """The foreground belongs to a job that ignores the hang-up when the shell dies: the session ends all the same."""
    terminal.run("echo $$ >shell")
    command = terminal.submit("bash -c \"trap '' HUP; kill -9 $(cat shell); echo alive; sleep 300\"")
    assert terminal.stream.until_end() == "ended"
    mark = terminal.stream.find_mark("finished", command)
    assert mark is not None
    assert mark["reason"] == "shell_ended"
    assert gone(terminal.process) == 0


def test_what_was_printed_last_is_not_lost(terminal: Terminal) -> None:
    """Output that was still in the terminal when the shell ended comes before the end."""
    command = terminal.submit("seq 1 3000; exit 0")
    assert terminal.stream.until_end() == "ended"
    mark = terminal.stream.find_mark("finished", command)
    assert mark is not None
    assert terminal.stream.between(mark["startOffset"], mark["offset"]).endswith(b"\n2999\r\n3000\r\n")


def test_stop_hangs_up(terminal: Terminal) -> None:
    """A stop ends what runs and what waits, and says that it was the reason."""
    running, waiting = terminal.submit("sleep 300"), terminal.submit("true")
    terminal.stream.until_mark("started", running)
    terminal.control.request("stop")
    assert terminal.control.request("stop")["ok"]
    with pytest.raises(RequestRefused, match="ended"):
        terminal.submit("echo late")
    assert terminal.stream.until_end() == "ended"
    reasons = {mark["commandId"]: mark["reason"] for mark in terminal.stream.marks if mark["kind"] == "finished"}
    assert reasons == {running: "stopped", waiting: "stopped"}
    assert gone(terminal.process) == 0


@pytest.mark.slow
def test_stop_kills_what_does_not_heed_it(terminal: Terminal) -> None:
    """A shell that ignores the hang-up is killed 2 s later."""
    terminal.run("trap '' HUP TERM")
    terminal.submit("while :; do :; done")
    terminal.control.request("stop")
    assert terminal.stream.until_end() == "ended"
    assert terminal.stream.marks[-1]["signal"] == signal.SIGKILL


def test_stop_while_the_program_is_blocked_on_its_output(tmp_path: Path) -> None:
    """A session that nobody reads can be stopped, and what it printed is still there afterwards."""
    with agent(tmp_path, spoolBytes=50_000) as process:
        terminal = Terminal(process)
        terminal.stream.acking = False
        terminal.submit("yes")
        terminal.stream.until(lambda: terminal.stream.position >= 50_000)
        terminal.control.request("stop")
        terminal.stream.connection.close()
        reader = process.attach(epoch=2)
        assert reader.until_end() == "ended"
        assert gone(process) == 0


def test_sigterm_hangs_up_and_serves_the_rest(terminal: Terminal) -> None:
    """A pod that is evicted loses no output that can still be written."""
    terminal.stream.acking = False
    terminal.run("echo precious")
    terminal.process.process.send_signal(signal.SIGTERM)
    terminal.stream.until_mark("ended")
    terminal.stream.connection.close()
    reader = terminal.process.attach(epoch=2)
    reader.until_text(b"\nprecious\r\n")
    assert reader.until_end() == "ended"
    assert gone(terminal.process) == TERMINATED


def test_sigterm_gives_up_when_the_grace_is_nearly_over(tmp_path: Path) -> None:
    """Nobody comes for the output: the agent goes by itself before it is killed."""
    with agent(tmp_path, "--grace", "0.4") as process:
        terminal = Terminal(process)
        terminal.stream.acking = False
        terminal.run("true")
        process.process.send_signal(signal.SIGTERM)
        assert gone(process) == TERMINATED


def test_sigterm_before_open_ends_at_once(tmp_path: Path) -> None:
    """A warm sandbox that nobody claimed has nothing to save."""
    process = AgentProcess(tmp_path)
    try:
        process.connect()
        process.process.send_signal(signal.SIGTERM)
        assert gone(process) == TERMINATED
    finally:
        process.stop()


def test_orphans_are_reaped(terminal: Terminal) -> None:
    """Processes whose parent died do not pile up as zombies."""
    terminal.run("for i in 1 2 3 4 5; do (sleep 0.01 & ) ; done; sleep 0.1")
    children = Path(f"/proc/{terminal.process.process.pid}/task/{terminal.process.process.pid}/children")
    wait_until(lambda: len(children.read_text().split()) == 1)


def test_the_shell_dies_with_the_agent(terminal: Terminal) -> None:
    """A killed agent leaves no shell that nobody could reach."""
    terminal.run("true")
    (shell,) = wire.descendants(terminal.process.process.pid)
    terminal.process.process.kill()
    terminal.process.process.wait()
    wait_until(lambda: wire.process_state(shell)[0] in ("", "Z"))


def test_the_agent_is_out_of_its_users_reach(tmp_path: Path) -> None:
    """Its own user can neither read the agent's memory and environment nor trace it; what it starts is ordinary."""
    with agent_of_nobody(tmp_path) as process:
        terminal = Terminal(process)
        printed = terminal.run("cat /proc/$$/oom_score_adj; head -c 5 /proc/$$/environ >/dev/null && echo readable")[1]
        assert printed == b"500\r\nreadable\r\n"
        assert terminal.run("cat /proc/$PPID/environ")[0]["exitCode"] == 1
        assert terminal.run("ls /proc/$PPID/fd")[0]["exitCode"] == 2
        assert terminal.run("exec 9>/proc/$PPID/mem")[0]["exitCode"] == 1


@contextmanager
def agent_of_nobody(directory: Path) -> Iterator[AgentProcess]:
    """An agent whose user is not root, also where the tests run as root."""
    python = "/usr/bin/python3"
    if os.geteuid() or not os.path.exists(python):
        with agent(directory) as running:
            yield running
        return
    with tempfile.TemporaryDirectory() as name:
        open_to_nobody = Path(name)
        script = open_to_nobody / "agent.py"
        script.write_text(AGENT.read_text())
        for path in (open_to_nobody, script):
            os.chown(path, NOBODY, NOBODY)
        running = AgentProcess(open_to_nobody, python=python, script=script, user=NOBODY)
        try:
            running.open()
            yield running
        finally:
            running.stop()


def test_what_a_user_runs_gives_way_to_the_agent(tmp_path: Path) -> None:
    """Where all share little processor, signals and keys still get through."""
    with agent(tmp_path, "--nice", "7") as process:
        own = os.getpriority(os.PRIO_PROCESS, process.process.pid)
        assert Terminal(process).run("nice")[1] == b"%d\r\n" % (own + 7)


def test_nothing_of_the_agent_is_inherited(terminal: Terminal) -> None:
    """The shell has its terminal and no other descriptor: no socket, no pipe of the agent."""
    printed = terminal.run("ls /proc/$$/fd")[1]
    assert printed.split() == [b"0", b"1", b"2", b"255"]


@pytest.mark.slow
def test_a_fork_bomb_ends_with_the_session(tmp_path: Path) -> None:
    """Processes that fork faster than one can count are gone when the agent is."""
    with agent(tmp_path) as process:
        terminal = Terminal(process)
        terminal.submit(
            "f() { while :; do (sleep 300; :) & sleep 0.01; done; }; for i in 1 2 3; do f & done; disown -a"
        )
        wait_until(lambda: len(wire.descendants(process.process.pid)) > 50)
        left = wire.descendants(process.process.pid)
        terminal.control.request("stop")
        assert terminal.stream.until_end() == "ended"
        assert gone(process) == 0
        assert [pid for pid in left if wire.process_state(pid)[0] not in ("", "Z")] == []


def other_pythons() -> list[str]:
    """Interpreters of other versions on this machine that can run the agent."""
    names = [f"python3.{minor}" for minor in range(8, 20)]
    found = [*filter(None, map(shutil.which, names)), *map(str, Path.home().glob(".pyenv/versions/3.*/bin/python3"))]
    show = "import sys; print(sys.version_info[:2])"
    versions = {python: subprocess.run([python, "-c", show], capture_output=True, text=True) for python in found}
    usable = {run.stdout: python for python, run in versions.items() if run.returncode == 0}
    return [python for version, python in usable.items() if (3, 8) <= ast.literal_eval(version) != sys.version_info[:2]]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["magic"],
        ["serve"],
        ["serve", "--socket", "s", "--workspace", "."],
        ["serve", "--socket", "s", "--workspace", ".", "--run-dir", ".", "--magic", "1"],
        ["serve", "--socket", "s", "--workspace", ".", "--run-dir", ".", "--limit", "MAGIC=1"],
        ["serve", "--socket", "s", "--workspace", ".", "--run-dir", ".", "--grace", "long"],
        ["serve", "--socket", "s", "--workspace", ".", "--run-dir", ".", "--nice", "very"],
        ["serve", "x", "--socket", "s", "--workspace", ".", "--run-dir", "."],
        ["attach"],
        ["control", "--socket"],
    ],
    ids=" ".join,
)
def test_wrong_options_are_told(words: list[str]) -> None:
    """Who starts it wrongly reads how to, and nothing is started."""
    result = subprocess.run([PYTHON, "-I", "-S", str(AGENT), *words], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("agent.py: bad options: ")
    assert "usage: agent.py serve" in result.stderr


@pytest.mark.slow
def test_other_pythons_run_the_agent(tmp_path: Path) -> None:
    """An image may bring any Python from 3.8 on."""
    for number, python in enumerate(other_pythons()):
        directory = tmp_path / str(number)
        directory.mkdir()
        process = AgentProcess(directory, python=python)
        try:
            process.open(notice="hello")
            terminal = Terminal(process)
            mark, printed = terminal.run("echo hi; touch new; exit 3")
            assert (mark["exitCode"], printed, len(mark["changed"])) == (3, b"hi\r\n", 1), python
            assert terminal.stream.until_end() == "ended"
            assert gone(process) == 0
        finally:
            process.stop()


@pytest.mark.slow
def test_an_idle_agent_uses_no_cpu(terminal: Terminal) -> None:
    """Between keepalives nothing wakes it up."""
    terminal.run("true")
    before = _cpu(terminal.process.process.pid)
    with pytest.raises(subprocess.TimeoutExpired):
        terminal.process.process.wait(2)
    assert _cpu(terminal.process.process.pid) - before <= 2  # clock ticks of 10 ms


def _cpu(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_program_that_the_hang_up_ends_before_its_shell_was_stopped(terminal: Terminal) -> None:
    """A shell that outlives the hang-up may still report its program's end: it did not end by itself."""
    terminal.run("trap '' HUP")
    command = terminal.submit("(trap - HUP; exec sleep 60)")
    program_runs(terminal.process, "sleep")
    terminal.control.request("stop")
    mark = terminal.stream.until_mark("finished", command)
    assert (mark["outcome"], mark["reason"], mark["exitCode"]) == ("killed", "stopped", None)
