"""What the subcommands print, and how they end."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import jwt
import pytest

from infra.local.keys import token_secret
from infra.local.presence import find
from producers.identity import LocalIdentity
from tests.cli.pigeon import Pigeon, error_line

pytestmark = pytest.mark.slow

FOR_EVER = b"import time\nwhile True: time.sleep(1)\n"


def lines(output: bytes) -> list[str]:
    return output.decode().splitlines()


def test_run_gives_the_scripts_output_and_exit_code(pigeon: Pigeon, tmp_path: Path) -> None:
    """stdout is what the script printed, byte for byte, and the status is the script's."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "sys.stdout.buffer.write(b'\\x00\\xff\\r\\n\\n' + repr(sys.argv[1:]).encode() + sys.stdin.buffer.read())\n"
        "sys.exit(7)\n"
    )
    result = pigeon.run("run", str(script), "a b", "--flag", "$HOME")
    assert (result.returncode, result.stdout, result.stderr) == (7, b"\x00\xff\r\n\n['a b', '--flag', '$HOME']", b"")


def test_run_reads_a_script_from_standard_input(pigeon: Pigeon) -> None:
    """`-` is standard input; a first line that names a shell has bash run it."""
    assert pigeon.run("run", "-", stdin=b"print(6 * 7)").stdout == b"42\n"
    assert pigeon.run("run", "-", stdin=b"#!/bin/bash\necho ${BASH_VERSION:+bash}").stdout == b"bash\n"


@pytest.mark.parametrize("name", ["plain.sh", "it's a $name.sh", "-c.sh", "é.sh"])
def test_a_script_named_sh_is_for_bash(pigeon: Pigeon, tmp_path: Path, name: str) -> None:
    """The name of the file decides, whatever else is in it."""
    script = tmp_path / name
    script.write_text("echo $0")
    assert pigeon.run("run", str(script)).stdout.decode().removeprefix("./") == f"{name}\n"


def test_run_streams_while_the_script_runs(pigeon: Pigeon) -> None:
    """Output comes when it is printed, not when the script ends; Ctrl-C ends it."""
    with pigeon.background("run", "-", stdin=b"print('first', flush=True)\n" + FOR_EVER) as running:
        assert running.line() == b"first\n"
        running.signal(signal.SIGINT)
        assert running.end().returncode == 130


def test_a_large_output_arrives_whole(pigeon: Pigeon) -> None:
    """Megabytes come out as they went in."""
    result = pigeon.run("run", "-", stdin=b"for i in range(300_000): print(i)")
    assert result.returncode == 0
    assert result.stdout == "".join(f"{i}\n" for i in range(300_000)).encode()


def test_a_script_that_is_killed_says_so(pigeon: Pigeon) -> None:
    """A time-out is status 124 and a word on stderr, never an exit code the script did not have."""
    result = pigeon.run("run", "--timeout", "1", "-", stdin=b"import time\nprint('on', flush=True)\ntime.sleep(60)")
    assert result.returncode == 124
    assert lines(result.stdout)[0] == "on"
    assert error_line(result) == "pigeon: the script was killed: timeout"


def test_run_leaves_no_session_behind(pigeon: Pigeon) -> None:
    """Whether the script ends by itself or is interrupted, its session is closed."""
    pigeon.run("run", "-u", "runner", "-", stdin=b"pass")
    with pigeon.background("run", "-u", "runner", "-", stdin=b"print('on', flush=True)\n" + FOR_EVER) as running:
        running.line()
        running.signal(signal.SIGTERM)
        result = running.end()
    assert (result.returncode, result.stderr) == (143, b"")
    assert [session for session in live(pigeon, "runner") if session["state"] != "closing"] == []


def live(pigeon: Pigeon, user: str) -> list[dict[str, str]]:
    listed: list[dict[str, str]] = json.loads(pigeon.run("sessions", "--json", "-u", user).stdout)
    return listed


def test_a_session_is_listed_followed_and_closed(pigeon: Pigeon) -> None:
    """The whole life of a session from the command line: sessions, tail, close, and tail again once it is over."""
    me = ("-u", "lister")
    with pigeon.background("run", *me, "-", stdin=b"print('in the transcript', flush=True)\n" + FOR_EVER) as running:
        running.line()
        session = live(pigeon, "lister")[0]["sessionId"]
        assert session in pigeon.run("sessions", *me).stdout.decode()
        with pigeon.background("tail", session[:8], *me) as tail:
            assert json.loads(pigeon.run("close", session, *me, "--json").stdout)["sessionId"] == session
            followed = tail.end()
        assert running.end().returncode in (124, 125)
    assert followed.returncode == 0
    assert b"in the transcript\n" in followed.stdout
    assert "closed" in error_line(followed)
    assert pigeon.run("tail", session, *me).stdout == followed.stdout
    assert "closed" in pigeon.run("sessions", "--all", *me).stdout.decode()
    assert live(pigeon, "lister") == []


def test_a_reader_that_goes_away_is_no_error(pigeon: Pigeon) -> None:
    """`pigeon run | head` says nothing about broken pipes."""
    with pigeon.background("run", "-", stdin=b"for i in range(300_000): print(i)") as running:
        assert running.line() == b"0\n"
        running.close_stdout()
        result = running.end()
    assert (result.returncode, result.stderr) == (1, b"")


def test_errors_are_one_line_with_a_code(pigeon: Pigeon, fresh: Pigeon) -> None:
    """Scripts can tell errors apart: usage is 2, everything else 1, and the code is stable."""
    assert pigeon.run("run").returncode == 2
    assert pigeon.run("frobnicate").returncode == 2
    assert pigeon.run("up", "--roles", "nothing").returncode == 2
    unknown = pigeon.run("tail", "sxxxx")
    assert (unknown.returncode, error_line(unknown)[-17:]) == (1, "[unknown_session]")
    missing = pigeon.run("run", "/nowhere/at/all.py")
    assert (missing.returncode, error_line(missing)[-10:]) == (1, "[os_error]")
    nothing = fresh.run("sessions")
    assert (nothing.returncode, error_line(nothing)[-13:]) == (1, "[not_running]")
    headless = pigeon.run("attach")
    assert (headless.returncode, error_line(headless)[-13:]) == (1, "[no_terminal]")


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://127.0.0.1:99999", "127.0.0.1:8080", "ftp://127.0.0.1", "http://"]
)
def test_an_address_that_is_none_is_said_in_a_line(fresh: Pigeon, url: str) -> None:
    """A slip of the pen is no stack trace, and nothing is tried eight times."""
    fresh.environment["PIGEON_TOKEN"] = "x"
    result = fresh.run("sessions", "--url", url)
    assert (result.returncode, error_line(result)[-11:]) == (1, "[malformed]")


def test_what_is_no_text_is_said_in_a_line(pigeon: Pigeon, fresh: Pigeon) -> None:
    """A token or an argument that no request can carry."""
    fresh.environment["PIGEON_TOKEN"] = os.fsdecode(b"a\xff")
    wrong = fresh.run("sessions", "--url", "http://127.0.0.1:1")
    assert (wrong.returncode, error_line(wrong)[-17:]) == (1, "[unauthenticated]")
    wrong = pigeon.run("run", "-", os.fsdecode(b"\xff"), stdin=b"pass")
    assert (wrong.returncode, error_line(wrong)[-11:]) == (1, "[malformed]")


def test_a_remote_stack_is_reached_by_address_and_token(pigeon: Pigeon) -> None:
    """--url with PIGEON_TOKEN is all that is needed, and without the token the reason is said."""
    presence = find(pigeon.state)
    assert presence is not None
    url = f"http://127.0.0.1:{presence.port}"
    token = pigeon.run("token", "--user", "remote").stdout.decode().strip()
    elsewhere = Pigeon(pigeon.state / "elsewhere")
    assert error_line(elsewhere.run("sessions", "--url", url))[-17:] == "[unauthenticated]"
    elsewhere.environment["PIGEON_TOKEN"] = f"{token}\n"  # as a file has it
    assert json.loads(elsewhere.run("sessions", "--url", url, "--json").stdout) == []
    elsewhere.environment["PIGEON_TOKEN"] = token[:-4]
    assert error_line(elsewhere.run("sessions", "--url", url))[-17:] == "[unauthenticated]"


async def test_a_token_is_the_users_and_ends(fresh: Pigeon) -> None:
    """`pigeon token` signs for the user it is told, without a running stack, and for so long."""
    token = fresh.run("token", "--user", "alice", "--hours", "0.5").stdout.decode().strip()
    identity = LocalIdentity(token_secret(fresh.state))
    assert (await identity.verify(token)).user == "alice"
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["exp"] - claims["iat"] == 1800


def test_the_demo_passes(pigeon: Pigeon) -> None:
    """Every step of the scripted session does what it should, on the stack that runs."""
    result = pigeon.run("demo")
    assert result.returncode == 0, result.stderr.decode()
    assert b"every step did what it should" in result.stderr
    assert b"hello from Python 3." in result.stdout


def test_the_demo_needs_nothing(fresh: Pigeon) -> None:
    """Where nothing runs it starts its own stack, and leaves nothing behind."""
    result = fresh.run("demo")
    assert result.returncode == 0, result.stderr.decode()
    assert not fresh.state.exists()
