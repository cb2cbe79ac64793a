"""What a person does in a session, through the HTTP functions, on a whole running stack."""

from __future__ import annotations

import base64

from producers.sessions import DEFAULT_PAGE
from tests.journeys.stack import Stack, User


async def test_a_command_runs_and_its_output_is_exact(alice: User) -> None:
    """What a command printed is between its offsets, byte for byte, with its exit code beside it."""
    session = await alice.ready()
    record, output = await alice.run(session, "printf 'a\\0b\\377c\\n'; exit_code() { return 3; }; exit_code")
    assert output == b"a\0b\xffc\r\n"
    assert (record["state"], record["exitCode"]) == ("exited", 3)


async def test_the_shell_is_one_shell(alice: User) -> None:
    """cd, variables and functions of one command are there for the next one."""
    session = await alice.ready()
    await alice.run(session, "mkdir -p deep/er && cd deep/er && GREETING=hello")
    record, output = await alice.run(session, "echo $GREETING from $PWD")
    assert output == b"hello from /workspace/deep/er\r\n"
    assert record["cwd"] == "/workspace/deep/er"


async def test_python_and_pip_are_there(alice: User) -> None:
    """A fresh session offers python3 and pip without any setting up."""
    session = await alice.ready()
    record, output = await alice.run(session, "pip --version && python3 -c 'print(6 * 7)'")
    assert record["exitCode"] == 0, output
    assert output.startswith(b"pip ")
    assert output.endswith(b"42\r\n")


async def test_a_repl_is_driven_by_input(alice: User) -> None:
    """A Python REPL holds the terminal, answers what is typed, and gives the prompt back."""
    session = await alice.ready()
    command = await alice.execute(session, "python3 -q")
    await alice.until_output(session, b">>> ")
    await alice.type(session, b"6 * 7\r")
    await alice.until_output(session, b"42\r\n")
    await alice.type(session, b"exit(5)\r")
    assert (await alice.ended(session, command))["exitCode"] == 5


async def test_a_command_waits_while_a_repl_holds_the_terminal(alice: User) -> None:
    """Commands run in the order of their numbers, each when the prompt is back."""
    session = await alice.ready()
    first = await alice.execute(session, "read line; echo got $line")
    second = await alice.execute(session, "echo second")
    await alice.until_output(session, b"read line")
    waiting = await alice.command(session, second)
    assert waiting is not None
    assert waiting["state"] == "waiting"
    await alice.type(session, b"this\r")
    assert (await alice.ended(session, first))["exitCode"] == 0
    record = await alice.ended(session, second)
    assert await alice.read(session, record["startOffset"], record["endOffset"]) == b"second\r\n"


async def test_ctrl_c_ends_an_endless_loop(alice: User) -> None:
    """The interrupt arrives at once, even while the loop floods the terminal."""
    session = await alice.ready()
    command = await alice.execute(session, "while true; do echo spinning; done")
    await alice.until_output(session, b"spinning\r\nspinning")
    await alice.call("POST", "signal", json={"sessionId": session, "signal": "INT"})
    record = await alice.ended(session, command)
    assert record["exitCode"] == 130
    assert (await alice.run(session, "echo still here"))[1] == b"still here\r\n"


async def test_the_last_of_many_commands_is_found(alice: User) -> None:
    """A list of commands comes in pages, and a long session has more than one."""
    session = await alice.ready()
    for _ in range(DEFAULT_PAGE):
        await alice.execute(session, "true")
    assert (await alice.run(session, "echo last"))[1] == b"last\r\n"


async def test_a_waiting_command_can_be_cancelled(alice: User) -> None:
    """A command that has not started is dropped, and says so."""
    session = await alice.ready()
    first = await alice.execute(session, "read line")
    second = await alice.execute(session, "touch never")
    await alice.until_output(session, b"read line")
    await alice.call("POST", "signal", json={"sessionId": session, "signal": "INT", "commandId": second})
    record = await alice.ended(session, second)
    assert (record["state"], record["reason"]) == ("killed", "cancelled")
    await alice.type(session, b"\r")
    await alice.ended(session, first)
    assert (await alice.run(session, "ls"))[1] == b""


async def test_a_command_that_takes_too_long_is_ended(alice: User) -> None:
    """The time-out is the sandbox's own business, and named."""
    session = await alice.ready()
    record, _ = await alice.run(session, "sleep 60", timeoutSeconds=1)
    assert (record["state"], record["reason"]) == ("killed", "timeout")


async def test_files_go_in_and_come_out(alice: User) -> None:
    """A pushed script runs; what it wrote is named, listed and read back."""
    session = await alice.ready()
    script = "import pathlib\npathlib.Path('out.bin').write_bytes(bytes(range(256)))\n"
    tree = [
        {"path": "work", "type": "directory"},
        {"path": "work/script.py", "type": "file", "content": script},
        {"path": "data.bin", "type": "file", "content": base64.b64encode(b"\0\xff").decode(), "encoding": "base64"},
    ]
    await alice.call("POST", "sync-files", expect=200, json={"sessionId": session, "fileStructure": tree})
    record, output = await alice.run(session, "python3 work/script.py && cat data.bin | od -An -tx1")
    assert output == b" 00 ff\r\n"
    assert record["changedFiles"] == [{"path": "out.bin", "change": "created"}]
    listing = await alice.call("GET", f"list-files/{session}", expect=200)
    assert {"data.bin", "out.bin", "work", "work/script.py"} <= {entry["path"] for entry in listing["files"]}
    response = await alice.http.get(
        alice.url(f"read-file/{session}"), params={"path": "out.bin"}, headers={"accept": "application/octet-stream"}
    )
    assert response.content == bytes(range(256))


async def test_a_window_that_is_resized_is_seen_by_programs(alice: User) -> None:
    """stty in the session knows the size of the user's window, from the start and after a change."""
    session = await alice.ready(rows=30, cols=100)
    assert (await alice.run(session, "stty size"))[1] == b"30 100\r\n"
    await alice.call("POST", "resize", json={"sessionId": session, "rows": 50, "cols": 132})
    assert (await alice.run(session, "stty size"))[1] == b"50 132\r\n"


async def test_reconnecting_finds_the_live_session(alice: User) -> None:
    """A reloaded page gets its session back, not a second one."""
    session = await alice.ready()
    await alice.run(session, "KEPT=yes")
    assert await alice.create(reconnect=True) == session
    assert (await alice.run(session, "echo $KEPT"))[1] == b"yes\r\n"


async def test_commands_sent_before_the_session_is_ready_run_in_order(alice: User) -> None:
    """Nobody has to wait for readiness: what is submitted early runs when the shell is there."""
    session = await alice.create()
    commands = [await alice.execute(session, f"echo {number}") for number in range(5)]
    records = [await alice.ended(session, command) for command in commands]
    assert [record["number"] for record in records] == [1, 2, 3, 4, 5]
    starts = [record["startOffset"] for record in records]
    assert starts == sorted(starts)


async def test_a_closed_session_keeps_its_transcript(alice: User, stack: Stack) -> None:
    """After the end the transcript is whole, ends where it says, and nothing of the sandbox is left."""
    session = await alice.ready()
    await alice.run(session, "seq 1 1000")
    await alice.call("DELETE", f"cleanup-session/{session}")
    output = await alice.transcript(session)
    assert output.end is not None
    assert output.end["finalOffset"] == output.offset
    assert not output.gaps
    assert b"".join(b"%d\r\n" % number for number in range(1, 1001)) in bytes(output.data)
    status = await alice.status(session)
    assert (status["state"], status["reason"]) == ("closed", "The session is closed. Its owner closed it.")
    assert not list((stack.state / "sandboxes").glob(f"session-{session}@*"))


async def test_the_shells_own_exit_ends_the_session(alice: User) -> None:
    """`exit` is a way out: the command has its exit code, the session says how its shell ended."""
    session = await alice.ready()
    command = await alice.execute(session, "exit 7")
    assert (await alice.ended(session, command))["exitCode"] == 7
    await alice.transcript(session)
    status = await alice.status(session)
    assert (status["state"], status["reason"]) == ("closed", "The session is closed. The shell exited with code 7.")


async def test_polling_without_a_cursor_gets_everything_once(alice: User) -> None:
    """The old frontend polls without a cursor; each answer holds what is new since the last one."""
    session = await alice.ready()
    await alice.run(session, "echo first")
    seen = (await alice.call("POST", "get-output", expect=200, json={"sessionId": session}))["output"]
    assert "first" in seen
    await alice.run(session, "echo second")
    seen = (await alice.call("POST", "get-output", expect=200, json={"sessionId": session}))["output"]
    assert "second" in seen
    assert "first" not in seen
