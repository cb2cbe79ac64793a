"""`pigeon up` as a process: how it starts, how it stops, and what it leaves behind."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest

from infra.local.presence import find
from tests.cli.pigeon import Background, Pigeon, error_line

pytestmark = pytest.mark.slow

FOR_EVER = b"print('on', flush=True)\nimport time\nwhile True: time.sleep(1)\n"


@pytest.fixture
def pigeon(tmp_path: Path, python: Path) -> Pigeon:
    """`pigeon` on a state folder of the test's own."""
    return Pigeon(tmp_path / "state", PIGEON_PYTHON=str(python))


def sandboxes(pigeon: Pigeon) -> set[int]:
    """The processes of the sandboxes that are there, by their records."""
    records = (pigeon.state / "sandboxes").glob("*/process.json")
    processes = [json.loads(record.read_text()) for record in records]
    return {process[part]["pid"] for process in processes for part in ("init", "monitor")}


def left(processes: set[int]) -> set[int]:
    """Those that still run a moment later."""
    until = time.monotonic() + 10
    while (running := {pid for pid in processes if Path(f"/proc/{pid}").exists()}) and time.monotonic() < until:
        time.sleep(0.02)  # processes of others: there is nothing to await
    return running


def started(stack: Background) -> str:
    """What it prints until it has printed the address, which is the third line."""
    return b"".join(stack.line() for _ in range(3)).decode()


def test_the_address_is_printed_when_it_works(pigeon: Pigeon) -> None:
    """Whoever opens the address at once finds the page."""
    with pigeon.background("up", "--port", "0") as stack:
        address = started(stack).split()[-1]
        assert httpx.get(address, trust_env=False).status_code == 303
        stack.signal(signal.SIGTERM)
        assert stack.end().returncode == 0


def test_ctrl_c_closes_the_sessions_and_leaves_no_process(pigeon: Pigeon) -> None:
    """The sessions end in good order, with their last words kept; the warm sandbox goes too."""
    with pigeon.up() as stack, pigeon.background("run", "-", stdin=FOR_EVER) as running:
        assert running.line() == b"on\n"
        session = json.loads(pigeon.run("sessions", "--json").stdout)[0]["sessionId"]
        processes = sandboxes(pigeon)
        assert processes
        with pigeon.background("tail", session) as tail:
            assert tail.line()
            stack.signal(signal.SIGINT)
            assert stack.end().returncode == 0
            followed = tail.end()
        running.end()
    assert "closed" in error_line(followed)
    assert left(processes) == sandboxes(pigeon) == set()
    assert find(pigeon.state) is None
    with pigeon.up():
        assert json.loads(pigeon.run("sessions", "--json").stdout) == []
        assert "closed" in pigeon.run("sessions", "--all").stdout.decode()


def test_a_second_ctrl_c_does_not_wait(pigeon: Pigeon) -> None:
    """Whoever is in a hurry is obeyed, and still no process is left."""
    with pigeon.up() as stack, pigeon.background("run", "-", stdin=FOR_EVER) as running:
        running.line()
        processes = sandboxes(pigeon)
        stack.signal(signal.SIGINT)
        stack.signal(signal.SIGINT)
        begun = time.monotonic()
        stack.end()
        assert time.monotonic() - begun < 15
    assert left(processes) == sandboxes(pigeon) == set()


def test_a_closed_terminal_ends_it_unless_nohup_says_no(pigeon: Pigeon) -> None:
    """Closing the window is like Ctrl-C; started with nohup, the stack stays."""
    with pigeon.up() as stack:
        stack.signal(signal.SIGHUP)
        assert stack.end().returncode == 0
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pigeon.up() as stack:
            signal.signal(signal.SIGHUP, before)
            stack.signal(signal.SIGHUP)
            assert pigeon.run("sessions").returncode == 0
            assert stack.runs()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_stack_a_folder_and_one_program_a_port(pigeon: Pigeon, tmp_path: Path) -> None:
    """A second `up` says why it does not start, in one line, and disturbs nobody."""
    with pigeon.up():
        second = pigeon.run("up", "--port", "0")
        assert (second.returncode, error_line(second)[-17:]) == (1, "[already_running]")
        assert pigeon.run("sessions").returncode == 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused = pigeon.run("up", "--port", str(taken.getsockname()[1]))
    assert (refused.returncode, error_line(refused)[-13:]) == (1, "[port_in_use]")


def test_sandboxes_survive_a_crash_and_are_adopted(pigeon: Pigeon) -> None:
    """After kill -9 the next start goes on with the session where it was."""
    pigeon.environment["PIGEON_TICK_SECONDS"] = "0.5"
    with pigeon.up() as stack, pigeon.background("run", "-", stdin=FOR_EVER):
        session = ""
        while not session:
            listed = json.loads(pigeon.run("sessions", "--json").stdout)
            session = next((entry["sessionId"] for entry in listed if entry["state"] == "ready"), "")
        stack.signal(signal.SIGKILL)
        stack.end()
        processes = sandboxes(pigeon)
        assert processes
        assert all(Path(f"/proc/{pid}").exists() for pid in processes)
        assert error_line(pigeon.run("sessions"))[-13:] == "[not_running]"
        with pigeon.up():
            listed = json.loads(pigeon.run("sessions", "--json").stdout)
            assert [(entry["sessionId"], entry["state"]) for entry in listed] == [(session, "ready")]
    assert left(processes) == sandboxes(pigeon) == set()


def test_a_worker_alone_does_not_end_sessions(pigeon: Pigeon) -> None:
    """With the roles in processes of their own, a worker comes and goes and the session stays."""
    with pigeon.background("up", "--port", "0", "--roles", "gateway") as gateway:
        pigeon.presence(gateway)
        with pigeon.background("up", "--roles", "worker,ticker") as worker:
            with pigeon.background("run", "-", stdin=FOR_EVER) as running:
                assert running.line() == b"on\n"
                worker.signal(signal.SIGTERM)
                assert worker.end().returncode == 0
                listed = json.loads(pigeon.run("sessions", "--json").stdout)
                assert [entry["state"] for entry in listed] == ["ready"]
                with pigeon.background("up") as again:
                    assert again.end().returncode == 1
            with pigeon.background("up", "--roles", "worker,ticker") as successor:
                session = listed[0]["sessionId"]
                with pigeon.background("tail", session) as tail:
                    pigeon.run("close", session)
                    assert tail.end().returncode == 0
                successor.signal(signal.SIGINT)
                successor.end()
        gateway.signal(signal.SIGINT)
        assert gateway.end().returncode == 0
    processes = sandboxes(pigeon)
    with pigeon.up():
        pass
    assert left(processes) == sandboxes(pigeon) == set()


def test_a_secret_that_others_can_read_stops_the_start(pigeon: Pigeon) -> None:
    """An insecure state folder is an error with a way out, not a warning."""
    pigeon.run("token")
    (pigeon.state / "token.secret").chmod(0o644)
    refused = pigeon.run("up", "--port", "0")
    assert (refused.returncode, error_line(refused)[-17:]) == (1, "[insecure_secret]")


def test_less_isolation_is_said_at_the_start(pigeon: Pigeon) -> None:
    """Sharing the host's network is never silent."""
    pigeon.environment["PIGEON_NETWORK"] = "host"
    with pigeon.background("up", "--port", "0") as stack:
        assert b"PIGEON_NETWORK=host" in stack.line()
        stack.signal(signal.SIGINT)
        stack.end()
