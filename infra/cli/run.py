"""`pigeon run`: one script, one session of its own, the script's output and exit code."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import shlex
import signal
import sys
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import typer

from infra.cli.markers import Cutter, Markers
from infra.cli.printable import printable
from infra.cli.tail import tell_gap, write
from infra.client import Client, Streamed
from schemas.errors import Malformed, PigeonError
from schemas.http import CommandStatus, StreamedData, StreamedGap
from schemas.lifecycle import CommandState
from schemas.limits import MAX_FILE_BYTES

KILLED, LOST = 124, 125  # exit statuses; 124 is what timeout(1) says
SHELL_LINE = re.compile(rb"#!.*\b(?:ba)?sh\b")


@dataclass(frozen=True, slots=True)
class Script:
    """What is to be run. `name` is its file's name in the workspace."""

    name: str
    content: bytes
    arguments: tuple[str, ...]

    @classmethod
    def read(cls, file: str, arguments: tuple[str, ...]) -> Script:
        """The script in that file, or on standard input for "-". Raises OSError, or Malformed if it is too large or an
        argument is no text."""
        content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1) if file == "-" else Path(file).read_bytes()
        if len(content) > MAX_FILE_BYTES:
            raise Malformed(f"a script has at most {MAX_FILE_BYTES} bytes")
        try:
            "".join(arguments).encode()
        except UnicodeEncodeError as error:
            raise Malformed("an argument is no UTF-8: a command is text") from error
        name = "script" if file == "-" else Path(file).name.encode(errors="replace").decode()
        return cls(name, content, arguments)

    @property
    def command(self) -> str:
        """The command that runs it: output as it is (no CR before LF), nothing to read."""
        shell = self.name.endswith(".sh") or SHELL_LINE.match(self.content.partition(b"\n")[0])
        name = f"./{self.name}" if self.name.startswith("-") else self.name  # not an option
        words = ["bash" if shell else "python3", name, *self.arguments]
        return f"stty -opost; {shlex.join(words)} </dev/null"


async def run(client: Client, script: Script, timeout: int | None) -> int:
    """Run it; returns its exit code, KILLED or LOST. Its session is closed in any case."""
    async with _ended_by(signal.SIGTERM), _own_session(client) as session:
        content = base64.b64encode(script.content).decode()
        file = {"path": script.name, "content": content, "encoding": "base64", "mode": 0o755}
        await client.push(session, [file])
        markers = Markers()
        submitted = await client.execute(session, markers.around(script.command), timeout)
        watching = asyncio.create_task(client.ended(session, submitted.command_id))
        try:
            await _print_output(client, session, markers.cutter(), watching)
            return command_status(await watching)
        finally:
            watching.cancel()


@asynccontextmanager
async def _own_session(client: Client) -> AsyncIterator[str]:
    session = (await client.create()).session_id
    try:
        yield session
    finally:
        with contextlib.suppress(PigeonError):  # what went wrong before it is what matters
            await client.close(session)


@asynccontextmanager
async def _ended_by(number: signal.Signals) -> AsyncIterator[None]:
    """Let the signal end this task in good order, as Ctrl-C does."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(number)


async def _print_output(client: Client, session: str, cutter: Cutter, watching: asyncio.Task[CommandStatus]) -> None:
    """Print the script's output as it comes, until its end marker or, where it was killed before, its end offset."""
    position = 0
    async with aclosing(client.stream(session)) as items:
        coming: asyncio.Task[Streamed | None] = asyncio.create_task(_next(items))
        try:
            while not cutter.done:
                await asyncio.wait({coming} if watching.done() else {coming, watching}, return_when=FIRST_COMPLETED)
                if watching.done() and position >= (watching.result().end_offset or 0):
                    break
                if not coming.done():
                    continue
                item = coming.result()
                if item is None:
                    break
                position = _print_item(item, cutter, position)
                coming = asyncio.create_task(_next(items))
        finally:
            coming.cancel()
            await asyncio.wait({coming})
    write(cutter.flush())


async def _next(items: AsyncGenerator[Streamed, None]) -> Streamed | None:
    return await anext(items, None)


def _print_item(item: Streamed, cutter: Cutter, position: int) -> int:
    """Print what is output of the script; returns the transcript's offset after the item."""
    if isinstance(item, StreamedData):
        write(cutter.feed(item.data))
        return item.offset + len(item.data)
    if isinstance(item, StreamedGap):
        tell_gap(item)
        return item.offset + (item.length or 0)
    return position


def command_status(command: CommandStatus) -> int:
    """The exit status that stands for how the command ended; says so where it has no exit code."""
    if command.state is CommandState.EXITED and command.exit_code is not None:
        return command.exit_code
    typer.echo(f"pigeon: the script was {command.state}: {printable(command.reason) or 'nobody knows why'}", err=True)
    return KILLED if command.state is CommandState.KILLED else LOST
