"""Submitted commands: what they print, how they end, and what the transcript shows of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from consumers.agent import agent as wire
from tests.agent.client import AgentProcess, RequestRefused, Terminal, agent

ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")

# text, exit code, output (None: not looked at); all of them in one shell, in this order
CASES: list[tuple[str, int, bytes | None]] = [
    ("echo hi", 0, b"hi\r\n"),
    ("false", 1, b""),
    ("echo $?", 0, b"1\r\n"),
    ("cd /usr/lib; pwd", 0, b"/usr/lib\r\n"),
    ("pwd", 0, b"/usr/lib\r\n"),
    ("if true; the", 2, None),
    ("echo 'unfinished", 2, None),
    ("for i in 1 2\ndo echo $i\ndone\n(exit 7)", 7, b"1\r\n2\r\n"),
    ("cat <<E\nh\"i'\nE", 0, b"h\"i'\r\n"),
    ("declare -a q=(1 2); export Z=5", 0, b""),
    ("echo ${q[1]} $Z; return 4", 4, b"2 5\r\n"),
    ("(kill -9 $BASHPID)", 137, None),
    ("nosuchcmd", 127, None),
    ("printf 'no newline'", 0, b"no newline"),
    ("printf '\\e]133;D;0;deadbeef\\a'; false", 1, b"\x1b]133;D;0;deadbeef\x07"),
    ('echo "a!b$((6*7))"', 0, b"a!b42\r\n"),
    ("echo '" + "x" * 200_000 + "' | wc -c", 0, b"200001\r\n"),
    ('printf "\\e]13"; sleep .05; printf "3;D;0;x\\a"; (exit 3)', 3, b"\x1b]133;D;0;x\x07"),
    ("read -t1 a <<< yes; echo $a", 0, b"yes\r\n"),
    ("false | true; echo ${PIPESTATUS[0]}", 0, b"1\r\n"),
    ("f(){ local z=1; return 9; }; f", 9, b""),
    ("f || echo still there", 0, b"still there\r\n"),
    ("tty -s", 0, b""),
    ("echo $LINENO\necho $LINENO", 0, b"1\r\n2\r\n"),
    ("-nosuch", 127, None),
    ("", 0, b""),
    ("# only a comment", 0, b""),
    ("echo \u00e9\u20ac\U0001f600 \ud83d", 0, "é€😀 ?\r\n".encode()),
    ("set -- a b; echo $#", 0, b"2\r\n"),
    ("unset PROMPT_COMMAND; false", 1, b""),
    ("PROMPT_COMMAND=; PS1='> '; PS0=; return 5", 5, b""),
    ("alias hello='echo aliased'", 0, b""),
    ("hello", 0, b"aliased\r\n"),
    ("trap 'true' DEBUG; echo trapped", 0, b"trapped\r\n"),
    ("trap - DEBUG; set -u; set -o pipefail; set -C", 0, b""),
    ("echo strict", 0, b"strict\r\n"),
    ("exec 3>&1 >/dev/null", 0, b""),
    ("echo lost", 0, b""),
    ("exec >&3; echo back", 0, b"back\r\n"),
    ("readonly status=1 text=2; (exit 8)", 8, b""),
    ("set -x; (exit 4); set +x", 0, None),
    ("python3 -c 'import sys; sys.exit(sys.stdin.isatty() * 6)'", 6, b""),
]


def test_commands_end_with_their_code_and_output(terminal: Terminal) -> None:
    """Whatever a command does to the shell, it and its successors have exact boundaries and codes."""
    for text, code, output in CASES:
        mark, printed = terminal.run(text)
        assert (mark["exitCode"], mark["outcome"], mark["reason"]) == (code, "exited", None), text[:60]
        assert output is None or printed == output, text[:60]


def test_the_transcript_reads_as_if_typed(terminal: Terminal) -> None:
    """A reader sees the prompt, the command, its output and the next prompt, and no trace of how it was run."""
    terminal.run("echo hi")
    terminal.run("for i in 1 2; do\n\techo $i\ndone")
    terminal.stream.until(lambda: terminal.stream.data.endswith(b" $ "))
    seen = ESCAPES.sub(b"", bytes(terminal.stream.data))
    assert seen == b"~ $ echo hi\r\nhi\r\n~ $ for i in 1 2; do\r\n> \techo $i\r\n> done\r\n1\r\n2\r\n~ $ "


def test_paste_mode_is_left_before_a_command_runs(terminal: Terminal) -> None:
    """A program that is pasted to must not get the prompt's paste brackets."""
    terminal.run("echo hi")
    terminal.stream.until_text(b"$ \x1b[?2004lecho hi\r\nhi\r\n\x1b[?2004h")


def test_marks_name_offsets_directory_and_time(terminal: Terminal) -> None:
    """A finished mark says where the output is, where the shell is, and how long it took."""
    command = terminal.submit("cd /usr; sleep 0.05; echo done")
    mark = terminal.stream.until_mark("finished", command)
    started = terminal.stream.find_mark("started", command)
    assert started is not None
    assert started["offset"] == mark["startOffset"] <= mark["offset"] - len(b"done\r\n")
    assert mark["cwd"] == "/usr"
    assert 0.05 <= mark["seconds"] < 10
    assert mark["number"] == started["number"] == 1


def test_half_typed_text_gives_way(terminal: Terminal) -> None:
    """What a user has typed at the prompt is neither run nor lost from the transcript."""
    terminal.stream.until_text(b"$ ")
    terminal.control.input(b"rm -rf nothing")
    terminal.stream.until_text(b"nothing")
    assert terminal.run("echo ran")[1] == b"ran\r\n"
    assert b"r/1\r" not in terminal.stream.data


@pytest.mark.parametrize("mode", ["vi", "emacs"])
def test_either_editing_mode_runs_commands(terminal: Terminal, mode: str) -> None:
    """vi users, even in the middle of an edit, run commands like everybody."""
    terminal.run(f"set -o {mode}")
    terminal.control.input(b"half typed\x1b0")
    terminal.stream.until_text(b"half typed")
    mark, printed = terminal.run("echo $((6*7))")
    assert (mark["exitCode"], printed) == (0, b"42\r\n")


def test_an_echo_that_is_drawn_differently_is_kept(tmp_path: Path) -> None:
    """Where line editing shows our typing in its own way every byte of it stays, with the command below."""
    with agent(tmp_path, cols=20) as process:
        terminal = Terminal(process)
        terminal.run("echo narrow")
        assert terminal.stream.until_text(b"$ \x1b[?2004lecho narrow\r\nnarrow\r\n")
        terminal.run("bind 'set horizontal-scroll-mode on'")
        mark, printed = terminal.run("echo scrolled")
        assert (mark["exitCode"], printed) == (0, b"scrolled\r\n")
        terminal.stream.until_text(b"\r\x1b[2K$ echo scrolled\r\nscrolled\r\n")


def test_the_run_directory_may_have_any_name(tmp_path: Path) -> None:
    """Blanks and quotes in a path do not reach the shell as syntax."""
    with agent(tmp_path, "--run-dir", str(tmp_path / "it's a dir")) as process:
        assert Terminal(process).run("echo fine")[1] == b"fine\r\n"


def test_control_characters_of_a_command_are_shown_not_obeyed(terminal: Terminal) -> None:
    """The text of a command steers nobody's terminal."""
    terminal.run("echo '\x1b[31m\x07\x9b' >/dev/null")
    assert b"echo '^[[31m^G^?' >/dev/null\r\n" in terminal.stream.data


def test_a_very_long_text_is_shown_in_part() -> None:
    """A 200 KB command does not become 200 KB of transcript."""
    shown = wire.shown("echo " + "x" * 200_000)
    assert len(shown) < wire.MAX_SHOWN_BYTES + 100
    assert shown.endswith(b"more bytes)\r\n")


def test_commands_are_in_the_history(terminal: Terminal) -> None:
    """Arrow-up finds what was submitted, and nothing of how it was run."""
    terminal.run("echo one\necho two")
    printed = terminal.run("history")[1].replace(b"\r\n", b"\n")
    assert b"echo one\necho two\n" in printed
    assert b" . /" not in printed


def test_a_number_is_run_once(terminal: Terminal) -> None:
    """A command delivered twice runs once, for ever."""
    request = {"number": 1, "commandId": "a", "text": "echo once >>log"}
    assert terminal.control.request("run", **request)["duplicate"] is False
    assert terminal.control.request("run", **request)["duplicate"] is True
    terminal.stream.until_mark("finished", "a")
    assert terminal.control.request("run", **request)["duplicate"] is True
    terminal.control.request("run", number=2, commandId="b", text="cat log")
    mark = terminal.stream.until_mark("finished", "b")
    terminal.stream.until(lambda: terminal.stream.position >= mark["offset"])
    assert terminal.stream.between(mark["startOffset"], mark["offset"]) == b"once\r\n"


@pytest.mark.parametrize(
    ("number", "command", "code", "expected"),
    [
        (3, "c", "command_gap", 2),
        (0, "c", "malformed", None),
        (1, "c", "command_conflict", None),
        (2, "a", "command_conflict", 1),
    ],
)
def test_numbers_have_no_gap_and_no_second_meaning(
    terminal: Terminal, number: int, command: str, code: str, expected: int | None
) -> None:
    """A command out of order is refused, and the refusal says which one is missing."""
    terminal.control.request("run", number=1, commandId="a", text="true")
    with pytest.raises(RequestRefused) as refused:
        terminal.control.request("run", number=number, commandId=command, text="true")
    assert (refused.value.code, refused.value.reply.get("expected")) == (code, expected)


def test_exit_ends_the_command_and_then_the_session(terminal: Terminal) -> None:
    """`exit 3` is a command with code 3, and what waited behind it is told that it never ran."""
    first = terminal.submit("sleep 0.1; exit 3")
    second = terminal.submit("echo never")
    assert terminal.stream.until_end() == "ended"
    kinds = [(m["kind"], m.get("commandId"), m.get("exitCode"), m.get("reason")) for m in terminal.stream.marks]
    assert kinds == [
        ("started", first, None, None),
        ("finished", first, 3, None),
        ("finished", second, None, "shell_ended"),
        ("ended", None, 3, None),
    ]
    assert terminal.stream.marks[2]["startOffset"] is None
    assert terminal.process.process.wait(10) == 0


def test_a_shell_that_is_killed_finished_nothing(terminal: Terminal) -> None:
    """An end state is never invented: no exit code where there was none."""
    command = terminal.submit("kill -9 $$")
    terminal.stream.until_end()
    mark = terminal.stream.find_mark("finished", command)
    assert mark is not None
    assert (mark["outcome"], mark["reason"], mark["exitCode"]) == ("killed", "shell_ended", None)
    assert (terminal.stream.marks[-1]["exitCode"], terminal.stream.marks[-1]["signal"]) == (None, 9)


FORGE = "n=${PROMPT-$PS1}; n=${n#*133;}; n=${n%%;*}; forge() { printf '\\e]133;%s;%s\\a' $n \"$1\"; }"


def test_a_mark_of_somebody_who_knows_the_nonce_ends_nothing_while_a_program_runs(terminal: Terminal) -> None:
    """An end counts only when the shell holds the terminal."""
    terminal.run("export PROMPT=$PS1")  # a script has no PS1 of its own
    program = f'{FORGE}; forge "D;0;$PPID"; sleep 0.2; exit 6'
    mark, printed = terminal.run(f"bash -c {wire.quoted(program)}")
    assert (mark["exitCode"], printed) == (6, b"")
    assert mark["seconds"] > 0.2


@pytest.mark.parametrize(
    "body", ["", ";", "D", "D;;", "D;\\xb2;$$", "D;-1;$$", "D;999;$$", "D;1e1;$$", "B;x", "X;1", "X;", "C;C", "B;;;"]
)
def test_a_forged_mark_of_any_shape_hurts_nobody(terminal: Terminal, body: str) -> None:
    """What looks like a mark and makes no sense is dropped, also while the shell holds the terminal."""
    body = body.replace("\\", "\\\\") if "x" not in body else body
    mark, _ = terminal.run(f"{FORGE}; forge $'{body.replace('$$', chr(39) + '$$' + chr(39))}'; (exit 6)")
    assert mark["exitCode"] == 6
    assert terminal.run("echo next")[1] == b"next\r\n"


def test_files_that_a_user_puts_in_the_way_do_not_stop_the_agent(terminal: Terminal) -> None:
    """User code can write to the run directory; a FIFO there makes nobody wait, and only that code is fooled."""
    run_dir = terminal.process.run_dir
    terminal.run(f"cd {run_dir}; mkfifo 2 2.text 2.status; mkdir 3 4.text; cd")
    assert terminal.run("(exit 5)")[0]["exitCode"] == 5
    assert terminal.run("echo three")[0]["reason"] == "not_started"
    assert terminal.run("echo four")[0]["reason"] == "not_started"
    assert terminal.run("echo five")[1] == b"five\r\n"


def test_output_of_the_background_is_kept_between_the_commands(terminal: Terminal) -> None:
    """A job that prints all the time loses no line to the way in which commands are typed."""
    terminal.run("for ((i = 0; i < 400; i++)); do echo =$i; sleep 0.002; done &")
    for number in range(30):
        assert terminal.run(f"(exit {number})")[0]["exitCode"] == number
    terminal.run("wait")
    numbers = [int(match) for match in re.findall(rb"=(\d+)\r\n", terminal.stream.data)]
    assert numbers == list(range(400))


def test_a_nested_shell_that_inherits_the_prompt_confuses_nobody(terminal: Terminal) -> None:
    """`export PS1` puts our marks into the prompt of every shell below; only the session's own counts."""
    terminal.run("export PS1 PROMPT_COMMAND; set -a")
    command = terminal.submit("bash --norc -i")
    terminal.stream.until_mark("started", command)
    waiting = terminal.submit("echo after")
    terminal.control.input(b"echo nested $((40+2))\r")
    terminal.stream.until_text(b"nested 42")
    assert terminal.stream.find_mark("finished", command) is None
    assert terminal.stream.find_mark("started", waiting) is None
    terminal.control.input(b"exit 5\r")
    assert terminal.stream.until_mark("finished", command)["exitCode"] == 5
    assert terminal.stream.until_mark("finished", waiting)["exitCode"] == 0


def test_typed_ahead_lines_do_not_blur_the_end(terminal: Terminal) -> None:
    """What the shell starts from typed-ahead input comes after the command's end, even when it is seen late."""
    command = terminal.submit("sleep 0.2; (exit 4)")
    terminal.stream.until_mark("started", command)
    terminal.control.input(b"sleep 0.3; (exit 9)\recho typed\r")
    mark = terminal.stream.until_mark("finished", command)
    assert mark["exitCode"] == 4
    terminal.stream.until_text(b"\rtyped\r\n")


def test_a_shell_without_bash_runs_commands_too(sh_process: AgentProcess) -> None:
    """Images without bash have sh, with the same boundaries."""
    terminal = Terminal(sh_process)
    for text, code, output in [
        ("echo hi", 0, b"hi\r\n"),
        ("false", 1, b""),
        ("echo $?", 0, b"1\r\n"),
        ("cd /usr; pwd", 0, b"/usr\r\n"),
        ("if true; the", 2, None),
        ("for i in 1 2\ndo echo $i\ndone\n(exit 7)", 7, b"1\r\n2\r\n"),
        ("kill -INT $$", 130, None),
        ("echo '" + "x" * 200_000 + "' | wc -c", 0, b"200001\r\n"),
        ("echo 'it'\\''s'", 0, b"it's\r\n"),
    ]:
        mark, printed = terminal.run(text)
        assert mark["exitCode"] == code, text
        assert output is None or printed == output, text
    assert b"/usr $ echo hi" not in terminal.stream.data
    assert b" . /" not in terminal.stream.data
    mark, _ = terminal.run("exit 3")
    assert mark["exitCode"] == 3


def test_a_command_cancelled_before_it_came_only_takes_its_number(terminal: Terminal) -> None:
    """What was cancelled while nobody could reach the agent never runs, is told of, and the next number is good."""
    terminal.submit("echo never >> ran", "cancelled", cancelled=True)
    mark = terminal.stream.until_mark("finished", "cancelled")
    assert (mark["outcome"], mark["reason"], mark["startOffset"]) == ("killed", "cancelled", None)
    assert terminal.run("ls")[1] == b""
    with pytest.raises(RequestRefused, match="malformed"):
        terminal.submit("echo never", "odd", cancelled="yes")


STALL = (
    'claim=$(declare -f __pigeon_claim); eval "${claim/__pigeon_/}"; '
    "__pigeon_claim() { BEFORE; local s=$EPOCHSECONDS; while (( EPOCHSECONDS < s + 12 )); do :; done; "
    'eval "$claim"; AFTER; }'
)


@pytest.mark.slow
def test_what_was_told_not_to_have_started_does_not_start_later(terminal: Terminal) -> None:
    """A shell that gets no processor may have read a command's script, and get to it long after it was given up."""
    terminal.run(STALL.replace("BEFORE", ":").replace("AFTER", 'claim "$1"'))
    mark, _ = terminal.run("touch started")
    assert (mark["outcome"], mark["reason"]) == ("killed", "not_started")
    assert terminal.run("ls started; (exit 5)")[0]["exitCode"] == 5
    assert b"No such file" in terminal.run("ls started")[1]


@pytest.mark.slow
def test_what_starts_as_it_is_given_up_is_not_given_up(terminal: Terminal) -> None:
    """The shell was there first: its exit code counts, not our patience."""
    terminal.run(STALL.replace("BEFORE", 'claim "$1"').replace("AFTER", ":"))
    mark, printed = terminal.run("echo late; (exit 3)")
    assert (mark["outcome"], mark["exitCode"]) == ("exited", 3)
    assert b"late" in printed
