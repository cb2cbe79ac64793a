"""`pigeon attach`: a session in your own terminal."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import termios
import tty
from asyncio import FIRST_COMPLETED
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress

import typer

from infra.cli.common import describe, find_session
from infra.cli.keyboard import Keyboard
from infra.cli.printable import printable
from infra.cli.tail import write
from infra.client import Client, Streamed
from schemas.errors import PigeonError, Rejected
from schemas.http import SessionStatus, StreamedData, StreamedEnd, StreamedGap
from schemas.lifecycle import ENDED, SessionState
from schemas.limits import KIB, MAX_INPUT_BYTES

SHOWN_BYTES = 32 * KIB  # of what was printed before
QUIET_SECONDS = 0.15  # without output of before: all of that is shown
FULL_SCREEN, NORMAL_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"
RESET = b"\x1b[?2004l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?25h\x1b[0m\r\n"
"""Undoes what a program that is left running did to the terminal: paste, mouse, cursor, colour."""


class NoTerminal(Rejected):
    """Standard input or output is no terminal."""

    code = "no_terminal"


async def attach(client: Client, name: str) -> int:
    """Use the session in this terminal until it ends or the user leaves; returns the exit status.

    Raises NoTerminal, and what the client raises. The terminal is as before on the way out.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise NoTerminal("attach needs a terminal: use tail, or run")
    rows, cols = _size()
    session = (
        await find_session(client, name)
        if name
        else (await client.create(reconnect=True, rows=rows, cols=cols)).session_id
    )
    status = await client.status(session)
    if status.state in ENDED:
        typer.echo(f"pigeon: {describe(status)} `pigeon tail {session}` shows its transcript", err=True)
        return 0
    typer.echo(f"pigeon: attached to {session}; ~. at the start of a line leaves it", err=True)
    attached = Attached(client, status)
    with _raw_terminal():
        error = await attached.run()
    if error is not None:
        raise error
    typer.echo(f"pigeon: {attached.parting}", err=True)
    return 0


def _size() -> tuple[int, int]:
    size = shutil.get_terminal_size()
    return size.lines, size.columns


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Keys come as they are typed, Ctrl-C among them."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor)
        yield
    finally:
        write(RESET)
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)


class Attached:
    """The three things that go on at once: output to the screen, keys to the session, size to the session."""

    def __init__(self, client: Client, status: SessionStatus) -> None:
        self.parting = f"left {status.session_id}, which goes on"
        self._client = client
        self._session = status.session_id
        self._replayed = status.usage.bytes
        self._keyboard = Keyboard()
        self._typed = asyncio.Queue[bytes]()
        self._left = asyncio.Event()
        self._resized = asyncio.Event()
        self._live = asyncio.Event()
        self._quiet: asyncio.TimerHandle | None = None
        self._full_screen = False

    async def run(self) -> PigeonError | None:
        """Return when the session ended or was left, or the error that made it impossible to go on."""
        self._resized.set()
        work = [self._show(), self._send(), self._send_size(), self._left.wait()]
        tasks = [asyncio.create_task(task) for task in work]
        with self._listening():
            done, _ = await asyncio.wait(tasks, return_when=FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._full_screen:
            write(NORMAL_SCREEN)
        for task in done:
            error = task.exception()
            if isinstance(error, PigeonError):
                return error
            if error is not None:
                raise error
        return None

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Keys, changes of the window's size, and signals that end this program in good order."""
        loop = asyncio.get_running_loop()
        loop.add_reader(sys.stdin.fileno(), self._on_keys)
        loop.add_signal_handler(signal.SIGWINCH, self._resized.set)
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._left.set)
        try:
            yield
        finally:
            loop.remove_reader(sys.stdin.fileno())
            for number in (signal.SIGWINCH, signal.SIGTERM, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _on_keys(self) -> None:
        try:
            typed = os.read(sys.stdin.fileno(), 16 * KIB)
        except OSError:
            typed = b""
        keys = self._keyboard.feed(typed)
        # Until the replay is over, what arrives may be this terminal's answers to questions of long ago.
        if keys and self._live.is_set():
            self._typed.put_nowait(keys)
        if not typed or self._keyboard.left:
            self._left.set()

    async def _send(self) -> None:
        """Send what was typed, in order: one request at a time, what comes meanwhile goes with the next."""
        while True:
            keys = bytearray(await self._typed.get())
            while not self._typed.empty():
                keys += self._typed.get_nowait()
            for start in range(0, len(keys), MAX_INPUT_BYTES):
                await self._client.send_input(self._session, bytes(keys[start : start + MAX_INPUT_BYTES]))

    async def _send_size(self) -> None:
        while True:
            await self._resized.wait()
            self._resized.clear()
            rows, cols = _size()
            with suppress(PigeonError):  # a size that did not arrive is no reason to leave
                await self._client.resize(self._session, rows, cols)

    async def _show(self) -> None:
        start = max(0, self._replayed - SHOWN_BYTES)
        async with aclosing(self._client.stream(self._session, start, self._on_break)) as items:
            async for item in items:
                self._await_quiet(item)
                if isinstance(item, StreamedData):
                    self._write(item.data)
                elif isinstance(item, StreamedGap):
                    size = "an unknown number of" if item.length is None else item.length
                    self._remark(f"{size} bytes of output were given up ({item.reason})")
                elif isinstance(item, SessionStatus):
                    self._tell(item)
                elif isinstance(item, StreamedEnd):
                    return

    def _await_quiet(self, item: Streamed) -> None:
        """Go live soon after the last of what was printed before, even if the session goes on printing."""
        replayed = isinstance(item, StreamedData) and item.offset < self._replayed
        if self._quiet is not None:
            if not replayed or self._live.is_set():
                return
            self._quiet.cancel()
        self._quiet = asyncio.get_running_loop().call_later(QUIET_SECONDS, self._on_quiet)

    def _write(self, data: bytes) -> None:
        write(data)
        entered, left = data.rfind(FULL_SCREEN), data.rfind(NORMAL_SCREEN)
        if entered != left:
            self._full_screen = entered > left

    def _on_quiet(self) -> None:
        termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
        self._live.set()

    def _on_break(self, error: PigeonError) -> None:
        self._remark(f"{error}; trying again")

    def _tell(self, status: SessionStatus) -> None:
        if status.state in ENDED:
            self.parting = describe(status)
        elif status.state is not SessionState.READY:
            self._remark(describe(status))
        elif status.warning is not None:
            self._remark(f"closes at {status.warning.astimezone():%H:%M} unless you type something")

    @staticmethod
    def _remark(text: str) -> None:
        write(f"\r\n\x1b[2m[pigeon: {printable(text)}]\x1b[0m\r\n".encode())
