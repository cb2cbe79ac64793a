"""A session in somebody's own terminal, which is a pseudo-terminal here."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
import tty
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager

import pytest

from infra.cli.attach import Attached
from infra.client import Client, Streamed
from schemas.errors import PigeonError
from schemas.http import SessionStatus, StreamedData
from tests.cli.pigeon import Pigeon

pytestmark = pytest.mark.slow

PATIENCE = 30.0
WORDS = itertools.count(100)
STATUS = {
    "sessionId": "s" + "a" * 25,
    "status": "ready",
    "state": "ready",
    "reason": "",
    "podName": "",
    "position": None,
    "warning": None,
    "rows": 24,
    "cols": 80,
    "createdAt": "2026-01-01T00:00:00Z",
    "readyAt": None,
    "lastActivityAt": "2026-01-01T00:00:00Z",
    "expiresAt": "2026-01-01T00:00:00Z",
    "endedAt": None,
    "finalOffset": None,
    "usage": {"bytes": 100},
}


class Terminal:
    """A person's terminal with `pigeon attach` in it."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        self._descriptor = descriptor
        self._seen = b""
        self._status: int | None = None

    def type(self, keys: bytes) -> None:
        """Press these keys."""
        os.write(self._descriptor, keys)

    def shows(self, text: bytes) -> bytes:
        """Wait until the screen has shown the text since the last one that was waited for; returns what it showed."""
        until = time.monotonic() + PATIENCE
        while text not in self._seen:
            assert time.monotonic() < until, f"{text!r} is not in {self._seen!r}"
            if select.select([self._descriptor], [], [], 0.2)[0]:
                self._seen += os.read(self._descriptor, 65536)
        before, _, self._seen = self._seen.partition(text)
        return before

    def has_shown(self, text: bytes) -> bool:
        """Whether the screen shows the text within a tenth of a second or so."""
        while select.select([self._descriptor], [], [], 0.1)[0]:
            self._seen += os.read(self._descriptor, 65536)
            if text in self._seen:
                return True
        return False

    def resize(self, rows: int, cols: int) -> None:
        """Change the window's size."""
        fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def is_raw(self) -> bool:
        """Whether keys go to the program as they are typed."""
        return not termios.tcgetattr(self._descriptor)[3] & termios.ICANON

    def end(self) -> int:
        """Wait for the program's end; its exit status."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status


@contextmanager
def attaching(pigeon: Pigeon, user: str) -> Iterator[Terminal]:
    """`pigeon attach` in a terminal of 24 rows and 80 columns."""
    pid, descriptor = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "infra.cli", "attach", "-u", user]
        os.execve(sys.executable, command, pigeon.environment)
    terminal = Terminal(pid, descriptor)
    try:
        terminal.resize(24, 80)
        yield terminal
    finally:
        os.close(descriptor)  # which hangs up
        terminal.end()


@contextmanager
def attached(pigeon: Pigeon, user: str) -> Iterator[Terminal]:
    """The same, at the session's prompt."""
    with attaching(pigeon, user) as terminal:
        terminal.shows(b"attached to ")
        terminal.shows(b"$ ")
        until_live(terminal)
        yield terminal


def until_live(terminal: Terminal) -> None:
    """Type a word until it is taken: what is typed during the replay is dropped, on purpose."""
    word = f"#{next(WORDS)}#".encode()
    until = time.monotonic() + PATIENCE
    while not terminal.has_shown(word) and time.monotonic() < until:
        terminal.type(word)
    terminal.type(b"\x15")  # clears the line
    terminal.shows(word)


def test_keys_output_and_size_are_the_sessions(pigeon: Pigeon) -> None:
    """What is typed runs there, Ctrl-C ends what runs there, and the window's size is the terminal's size there."""
    with attached(pigeon, "typist") as terminal:
        assert terminal.is_raw()
        terminal.type(b"echo one$((1 + 1))three\r")
        terminal.shows(b"one2three")
        terminal.resize(40, 100)
        terminal.type(b"until [ \"$(stty size)\" = '40 100' ]; do :; done; echo re''sized\r")
        terminal.shows(b"resized\r\n")
        terminal.type(b"echo lo''oping; while :; do :; done\r")
        terminal.shows(b"looping\r\n")
        terminal.type(b"\x03")
        terminal.shows(b"$ ")
        terminal.type(b"echo $?\r")
        terminal.shows(b"130\r\n")


class Runaway(Client):
    """A client of a session that prints without end and without a pause."""

    def __init__(self) -> None:
        self.typed = asyncio.Event()

    async def stream(
        self, session: str, offset: int = 0, on_break: Callable[[PigeonError], None] = lambda _: None
    ) -> AsyncGenerator[Streamed, None]:
        """One byte at a time."""
        while True:
            yield StreamedData(offset=offset, data=b".")
            offset += 1
            await asyncio.sleep(0)

    async def send_input(self, session: str, data: bytes) -> None:
        """Note that something arrived."""
        self.typed.set()

    async def resize(self, session: str, rows: int, cols: int) -> None:
        """Nothing to see."""


@contextmanager
def own_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """This process in a terminal whose screen is not looked at; gives where to type."""
    keyboard, descriptor = pty.openpty()
    tty.setraw(descriptor)
    with os.fdopen(descriptor, "r") as stdin, open(os.devnull, "w") as stdout:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stdout", stdout)
        yield keyboard
        os.close(keyboard)


async def test_a_session_that_prints_without_end_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes back to a runaway program ends it with Ctrl-C: it need not pause first to be listened to."""
    status = SessionStatus.model_validate_json(json.dumps(STATUS))
    client = Runaway()
    with own_terminal(monkeypatch) as keyboard:
        running = asyncio.create_task(Attached(client, status).run())
        try:
            async with asyncio.timeout(PATIENCE):
                while not client.typed.is_set():
                    os.write(keyboard, b"\x03")
                    await asyncio.sleep(0)
        finally:
            os.write(keyboard, b"\r~.")
            assert await running is None


def test_leaving_gives_the_terminal_back_and_the_session_goes_on(pigeon: Pigeon) -> None:
    """~. leaves; who comes back sees where it was."""
    with attached(pigeon, "leaver") as terminal:
        terminal.type(b"COLOUR=green; echo $COLOUR\r")
        terminal.shows(b"\rgreen\r\n")
        terminal.type(b"\r~.")
        terminal.shows(b"which goes on\r\n")
        assert terminal.end() == 0
        assert not terminal.is_raw()
    with attached(pigeon, "leaver") as terminal:
        terminal.type(b"echo still $COLOUR\r")
        terminal.shows(b"\rstill green\r\n")
        terminal.type(b"\r~.")
        assert terminal.end() == 0


def test_the_sessions_end_is_the_end(pigeon: Pigeon) -> None:
    """`exit` ends the session and the attachment, with a word on why."""
    with attached(pigeon, "leaver-by-exit") as terminal:
        terminal.type(b"exit\r")
        terminal.shows(b"is closed")
        assert terminal.end() == 0
        assert not terminal.is_raw()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_gives_the_terminal_back_too(pigeon: Pigeon, number: signal.Signals) -> None:
    """Whoever kills the program does not have to type `reset`."""
    with attached(pigeon, "killed") as terminal:
        os.kill(terminal.pid, number)
        terminal.shows(b"which goes on\r\n")
        assert terminal.end() == 0
        assert not terminal.is_raw()


def test_answers_to_old_questions_are_not_typed(pigeon: Pigeon) -> None:
    """A replayed question (where is the cursor?) makes the terminal answer again: the session must not hear it."""
    with attached(pigeon, "asker") as terminal:
        terminal.type(b"printf '\\033[6n'; read -rs -d R; echo answered\r")
        terminal.shows(b"\x1b[6n")
        terminal.type(b"\x1b[1;1R")
        terminal.shows(b"answered\r\n")
        terminal.type(b"\r~.")
        terminal.end()
    with attaching(pigeon, "asker") as terminal:
        terminal.shows(b"\x1b[6n")
        terminal.type(b"\x1b[7;7R")
        terminal.shows(b"answered\r\n")
        until_live(terminal)
        terminal.type(b"echo do''ne\r")
        assert b"7;7R" not in terminal.shows(b"done\r\n")
