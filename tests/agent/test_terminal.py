"""The terminal itself: input, size, signals, and how running commands are ended."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from consumers.agent import agent as wire
from tests.agent.client import AgentProcess, RequestRefused, Terminal, agent, program_runs, wait_until

# Signals 32 and 33 belong to the C library's threads: no program can set them, so one that was started with them
# ignored, as some launchers do, passes that on.
RESERVED_BY_LIBC = 0b11 << 31


def started(terminal: Terminal, text: str) -> str:
    """Submit a command and wait until it runs."""
    command = terminal.submit(text)
    terminal.stream.until_mark("started", command)
    return command


def test_input_goes_to_the_running_program(terminal: Terminal) -> None:
    """A command has the terminal: what is typed is its input."""
    command = started(terminal, 'read -r line; echo "got $line"')
    terminal.control.input("grüße\r".encode())
    mark = terminal.stream.until_mark("finished", command)
    terminal.stream.until(lambda: terminal.stream.position >= mark["offset"])
    assert terminal.stream.between(mark["startOffset"], mark["offset"]) == "grüße\r\ngot grüße\r\n".encode()


def test_input_is_typed_once(terminal: Terminal) -> None:
    """An input event delivered twice is typed once."""
    command = started(terminal, 'read -r line; echo "got $line"')
    assert terminal.control.input(b"a", id="e1")["duplicate"] is False
    assert terminal.control.input(b"a", id="e1")["duplicate"] is True
    terminal.control.input(b"\r", id="e2")
    terminal.stream.until_mark("finished", command)
    terminal.stream.until_text(b"got a\r\n")


def test_the_terminal_has_the_size_it_is_given(terminal: Terminal) -> None:
    """Rows and columns are those of OPEN until a resize."""
    assert terminal.run("stty size")[1] == b"24 80\r\n"
    terminal.control.request("resize", id="r1", rows=50, cols=132)
    assert terminal.run("stty size")[1] == b"50 132\r\n"
    assert terminal.control.request("resize", id="r1", rows=1, cols=1)["duplicate"] is True
    assert terminal.run("stty size")[1] == b"50 132\r\n"


def test_the_shell_has_a_sensible_environment(tmp_path: Path) -> None:
    """HOME is the workspace, where the shell starts; what OPEN gives is there too."""
    with agent(tmp_path, env={"GREETING": "hello there"}) as process:
        terminal = Terminal(process)
        printed = terminal.run("echo $HOME $PWD $TERM $GREETING; echo ${SHLVL-}; ulimit -c")[1]
        home = str(process.workspace)
        assert printed.startswith(f"{home} {home} xterm-256color hello there\r\n".encode())


def test_a_startup_file_of_the_user_is_read(tmp_path: Path) -> None:
    """A ~/.bashrc may set the prompt and more, and commands still have boundaries."""
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / ".bashrc").write_text("PS1='mine> '; PROMPT_COMMAND='true'; alias ll='echo listed'\n")
    with agent(tmp_path) as process:
        terminal = Terminal(process)
        terminal.stream.until_text(b"mine> ")
        assert terminal.run("ll")[1] == b"listed\r\n"


def test_limits_bind_the_shell_and_not_the_agent(tmp_path: Path) -> None:
    """What is started below the shell has the limits; the agent has its own."""
    with agent(tmp_path, "--limit", "NOFILE=99", "FSIZE=4096", "--limit", "CORE=0") as process:
        terminal = Terminal(process)
        assert terminal.run("ulimit -n; ulimit -c")[1] == b"99\r\n0\r\n"
        assert terminal.run("head -c 10000 /dev/zero >big")[0]["exitCode"] != 0
        limits = Path(f"/proc/{process.process.pid}/limits").read_text()
        assert " 99 " not in limits


def test_interrupting_a_flood_works_at_once(terminal: Terminal) -> None:
    """Ctrl-C ends `yes` although its output has not been read by far."""
    command = started(terminal, "yes")
    program_runs(terminal.process, "yes")
    terminal.control.signal("INT")
    assert terminal.stream.until_mark("finished", command)["exitCode"] == 130


@pytest.mark.parametrize("how", ["signal", "key"])
def test_interrupting_under_back_pressure(tmp_path: Path, how: str) -> None:
    """Nobody commits, the program is blocked on its output, and yet Ctrl-C ends it."""
    with agent(tmp_path, spoolBytes=50_000) as process:
        terminal = Terminal(process)
        terminal.stream.acking = False
        command = started(terminal, "yes")
        pid = program_runs(process, "yes")
        terminal.stream.until(lambda: terminal.stream.position >= 50_000)
        terminal.control.signal("INT") if how == "signal" else terminal.control.input(b"\x03")
        wait_until(lambda: wire.process_state(pid)[0] in ("", "Z"))
        reader = process.attach(epoch=2)
        assert reader.until_mark("finished", command)["exitCode"] == 130


def test_an_interrupt_after_the_end_does_not_change_the_exit_code(tmp_path: Path) -> None:
    """A ^C makes the terminal forget what was not read yet, the mark of the end included; the code stays true."""
    with agent(tmp_path, spoolBytes=50_000) as process:
        terminal = Terminal(process)
        terminal.stream.acking = False
        command = terminal.submit("head -c 52000 /dev/zero | tr '\\0' x; touch done; (exit 3)")
        wait_until((process.workspace / "done").exists)
        wait_until((process.run_dir / "1.status").exists)
        terminal.control.input(b"\x03")
        reader = process.attach(epoch=2)
        mark = reader.until_mark("finished", command)
        assert (mark["exitCode"], mark["outcome"]) == (3, "exited")


def test_interrupting_past_the_budget(tmp_path: Path) -> None:
    """`yes` whose output is thrown away is ended by Ctrl-C as at any time."""
    with agent(tmp_path, outputBytes=1_000) as process:
        terminal = Terminal(process)
        command = started(terminal, "yes")
        wait_until(lambda: terminal.control.request("status")["discarded"] > 1_000_000)
        terminal.control.input(b"\x03")
        mark = terminal.stream.until_mark("finished", command)
        assert (mark["exitCode"], mark["outcome"]) == (130, "exited")


def test_interrupting_a_program_that_reads_nothing(terminal: Terminal) -> None:
    """A ^C overtakes input that the program has not read, however much of it there is, and takes it along."""
    command = started(terminal, "sleep 60")
    program_runs(terminal.process, "sleep")
    terminal.control.input(b"x" * 300_000)
    terminal.control.input(b"lost\x03")
    assert terminal.stream.until_mark("finished", command)["exitCode"] == 130
    assert terminal.run("echo clean")[1] == b"clean\r\n"
    assert b"xxx: command not found" not in terminal.stream.data


def test_waiting_input_is_bounded(terminal: Terminal) -> None:
    """Who types faster than the program reads is refused, not buffered without end."""
    started(terminal, "stty raw -echo; sleep 60")
    with pytest.raises(RequestRefused, match="input_full"):
        _type_for_ever(terminal)


def _type_for_ever(terminal: Terminal) -> None:
    for _ in range(100):
        terminal.control.input(b"x" * 60_000)


def test_the_end_of_input_can_be_typed(terminal: Terminal) -> None:
    """EOF ends `cat` as Ctrl-D does, whatever the terminal's character for it is."""
    command = started(terminal, "stty eof ^X; cat; stty eof ^D")
    program_runs(terminal.process, "cat")
    terminal.control.input(b"line\r")
    terminal.control.signal("EOF")
    assert terminal.stream.until_mark("finished", command)["exitCode"] == 0


@pytest.mark.parametrize(("name", "code"), [("TERM", 143), ("KILL", 137), ("QUIT", 131)])
def test_signals_reach_the_foreground(terminal: Terminal, name: str, code: int) -> None:
    """A signal goes to the program that holds the terminal, and its end is an ordinary exit."""
    command = started(terminal, "ulimit -c 0; sleep 60")
    program_runs(terminal.process, "sleep")
    terminal.control.signal(name)
    mark = terminal.stream.until_mark("finished", command)
    assert (mark["exitCode"], mark["outcome"]) == (code, "exited")


def test_ignored_signals_are_not_inherited(tmp_path: Path) -> None:
    """An agent that was started with signals ignored, as background jobs are, gives its shell ordinary ones."""
    ignoring = ["env", "--ignore-signal=QUIT", "--ignore-signal=INT", "--block-signal=TERM"]
    process = AgentProcess(tmp_path, before=ignoring)
    try:
        process.open()
        printed = Terminal(process).run("sh -c 'grep -E \"^Sig(Blk|Ign)\" /proc/self/status'")[1]
        masks = dict(line.split(b":\t") for line in printed.splitlines())
        assert {name: int(mask, 16) & ~RESERVED_BY_LIBC for name, mask in masks.items()} == {b"SigBlk": 0, b"SigIgn": 0}
    finally:
        process.stop()


def test_an_idle_shell_survives_every_signal(terminal: Terminal) -> None:
    """Pressing the button once too often does not cost the session."""
    terminal.run("x=kept")
    for name in ("INT", "TERM", "KILL", "QUIT"):
        terminal.stream.until(lambda: terminal.stream.data.endswith(b"$ "))
        wait_until(lambda: terminal.control.request("status")["state"] == "idle")
        terminal.control.signal(name)
    assert terminal.run("echo $x")[1] == b"kept\r\n"


def test_a_command_has_a_time_limit(terminal: Terminal) -> None:
    """Past its time-out a command is interrupted, and that is what its end says."""
    mark, _ = terminal.run("sleep 60", timeoutSeconds=0.2)
    assert (mark["outcome"], mark["reason"], mark["exitCode"]) == ("killed", "timeout", None)
    assert terminal.run("echo next")[1] == b"next\r\n"


def test_a_time_limit_of_years_is_one(terminal: Terminal) -> None:
    """A limit longer than any session is no special case."""
    mark, _ = terminal.run("(exit 6)", timeoutSeconds=9e8)
    assert (mark["outcome"], mark["exitCode"]) == ("exited", 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["trap '' INT; sleep 60", "trap '' INT TERM; sleep 60; true"], ids=["needs TERM", "needs KILL"]
)
def test_a_stubborn_command_is_killed(terminal: Terminal, text: str) -> None:
    """INT, TERM and KILL come 2 s apart, and the shell lives on where it can."""
    mark, _ = terminal.run(f"bash -c {wire.quoted(text)}", timeoutSeconds=0.1)
    assert (mark["outcome"], mark["reason"]) == ("killed", "timeout")
    assert 2 < mark["seconds"] < 8
    assert terminal.run("echo next")[1] == b"next\r\n"


@pytest.mark.slow
def test_a_loop_that_nothing_stops_costs_the_shell(terminal: Terminal) -> None:
    """A shell loop that ignores everything is ended with its shell: a time-out is a promise."""
    command = terminal.submit("trap '' INT TERM; while :; do sleep 1; done", timeoutSeconds=0.1)
    assert terminal.stream.until_end() == "ended"
    mark = terminal.stream.find_mark("finished", command)
    assert mark is not None
    assert (mark["outcome"], mark["reason"]) == ("killed", "timeout")


def test_a_busy_loop_in_the_shell_is_interrupted(terminal: Terminal) -> None:
    """A loop of builtins has no process of its own; it ends all the same."""
    mark, _ = terminal.run("while :; do :; done", timeoutSeconds=0.2)
    assert (mark["outcome"], mark["reason"]) == ("killed", "timeout")


def test_a_running_command_can_be_cancelled(terminal: Terminal) -> None:
    """Cancel interrupts; asking again changes nothing."""
    command = started(terminal, "sleep 60")
    terminal.control.request("cancel", commandId=command)
    terminal.control.request("cancel", commandId=command)
    mark = terminal.stream.until_mark("finished", command)
    assert (mark["outcome"], mark["reason"]) == ("killed", "cancelled")
    terminal.control.request("cancel", commandId=command)
    assert terminal.run("echo next")[0]["outcome"] == "exited"


def test_a_waiting_command_can_be_cancelled(terminal: Terminal) -> None:
    """What was dropped before its turn never runs."""
    running = started(terminal, "sleep 0.3")
    waiting = terminal.submit("touch ran")
    terminal.control.request("cancel", commandId=waiting)
    mark = terminal.stream.until_mark("finished", waiting)
    assert (mark["outcome"], mark["reason"], mark["startOffset"]) == ("killed", "cancelled", None)
    assert terminal.stream.find_mark("finished", running) is None
    terminal.run("true")
    assert not (terminal.process.workspace / "ran").exists()


def test_nobody_cancels_what_was_never_submitted(terminal: Terminal) -> None:
    """An unknown command is refused."""
    with pytest.raises(RequestRefused) as refused:
        terminal.control.request("cancel", commandId="nosuch")
    assert refused.value.code == "unknown_command"


def test_commands_wait_while_a_repl_holds_the_terminal(terminal: Terminal) -> None:
    """A command is never typed into somebody else's program, and no time-out runs while it waits."""
    terminal.stream.until_text(b"$ ")
    terminal.control.input(b"cat\r")
    command = terminal.submit("echo ran", timeoutSeconds=0.1)
    program_runs(terminal.process, "cat")
    terminal.control.input(b"to cat\r")
    terminal.stream.until_text(b"to cat\r\nto cat\r\n")
    assert terminal.control.request("status")["waiting"] == 1
    time.sleep(0.15)
    assert terminal.stream.find_mark("started", command) is None
    terminal.control.input(b"\x04")
    assert terminal.stream.until_mark("finished", command)["exitCode"] == 0


def test_commands_wait_for_an_unfinished_line(terminal: Terminal) -> None:
    """In the middle of a multi-line command that a user types, nothing is swallowed."""
    terminal.stream.until_text(b"$ ")
    terminal.control.input(b"for i in 1 2; do\r")
    command = terminal.submit("echo after")
    terminal.control.input(b"echo loop $i; done\r")
    mark = terminal.stream.until_mark("finished", command)
    terminal.stream.until(lambda: terminal.stream.position >= mark["offset"])
    assert terminal.stream.data.index(b"\rloop 1\r\nloop 2\r\n") < mark["startOffset"]
    assert terminal.stream.between(mark["startOffset"], mark["offset"]) == b"after\r\n"


@pytest.mark.parametrize("how", ["key", "signal"])
def test_an_interrupt_while_the_shell_starts_does_not_kill_it(tmp_path: Path, how: str) -> None:
    """Whoever presses Ctrl-C before the prompt is there still gets a prompt."""
    for number in range(5):
        (tmp_path / str(number)).mkdir()
        with agent(tmp_path / str(number)) as process:
            terminal = Terminal(process)
            terminal.control.input(b"\x03") if how == "key" else terminal.control.signal("INT")
            assert terminal.run("echo ready")[1] == b"ready\r\n"


@pytest.mark.slow
@pytest.mark.parametrize("keys", [b"\x03", b"echo typed\r", b"abc\x03", b"\r\r\r"])
def test_keys_that_race_with_a_command_do_not_hurt_it(terminal: Terminal, keys: bytes) -> None:
    """Whatever is typed at the moment a command starts, it runs exactly once."""
    for number in range(20):
        command = f"race{number}"
        terminal.control.input(keys)
        terminal.submit(f"echo {number} >>log", command)
        terminal.stream.until_mark("finished", command)
    log = (terminal.process.workspace / "log").read_text()
    assert log == "".join(f"{number}\n" for number in range(20))
