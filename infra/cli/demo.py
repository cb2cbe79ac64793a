"""`pigeon demo`: a session by script. Each step checks what it expects; the transcript streams to stdout meanwhile."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import typer

from infra.cli.tail import tell_gap, write
from infra.client import Client, local
from infra.local.presence import find
from infra.settings import Settings
from schemas.errors import PigeonError
from schemas.http import SessionStatus, StreamedData, StreamedEnd, StreamedGap
from schemas.lifecycle import ENDED, CommandState, SessionState

START_SECONDS = 60.0  # for the stack; a first start makes its database and a sandbox
STEP_SECONDS = 60.0
POLL_SECONDS = 0.05

SCRIPT = """\
import platform, sys
print(f"hello from Python {platform.python_version()}")
with open("result.txt", "w") as file:
    file.write("forty-two\\n")
"""


class StepFailed(PigeonError):
    """A step did not do what it should; the message names it."""

    code = "step_failed"


async def demo() -> int:
    """Run every step; returns the exit status. Raises StepFailed."""
    state = Settings.from_environment().state
    if find(state) is not None:
        async with local(state, "demo") as client:
            return await _play(client)
    with tempfile.TemporaryDirectory(prefix="pigeon-demo-") as folder:
        _head("no stack runs here: starting one for this demo")
        async with _stack(Path(folder)), local(Path(folder), "demo") as client:
            return await _play(client)


@asynccontextmanager
async def _stack(state: Path) -> AsyncIterator[None]:
    """A whole stack in a process of its own, on a free port."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "infra.cli", "up", "--port", "0",
        env={**os.environ, "PIGEON_STATE": str(state)},
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is ours to pass on, after the session is closed
    )  # fmt: skip
    try:
        async with asyncio.timeout(START_SECONDS):
            while (presence := find(state)) is None or presence.port is None:
                if process.returncode is not None:
                    raise StepFailed("the stack did not start")
                await asyncio.sleep(POLL_SECONDS)
        yield
    except TimeoutError as error:
        raise StepFailed(f"the stack did not start within {START_SECONDS:g} s") from error
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        await process.wait()


async def _play(client: Client) -> int:
    script = _Script(client)
    for number, (title, step) in enumerate(script.steps, 1):
        _head(f"{number}. {title}")
        try:
            async with asyncio.timeout(STEP_SECONDS):
                await step()
        except TimeoutError as error:
            await script.stop()
            raise StepFailed(f"step {number} ({title}): nothing of the kind within {STEP_SECONDS:g} s") from error
        except PigeonError as error:
            await script.stop()
            raise StepFailed(f"step {number} ({title}): {error}") from error
    _head("every step did what it should")
    return 0


def _head(text: str) -> None:
    sys.stdout.flush()
    typer.echo(f"\n── {text}", err=True)


class _Screen:
    """Follows a transcript in the background: prints it, and keeps it for looking at."""

    def __init__(self, client: Client, session: str) -> None:
        self.transcript = b""
        self.states: list[SessionStatus] = []
        self.final_offset: int | None = None
        self._news = asyncio.Condition()
        self._task = asyncio.create_task(self._follow(client, session))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until this holds of what was seen. Raises what ended the stream."""
        async with self._news:
            while not holds():
                if self._task.done():
                    await self._task
                    raise StepFailed("the transcript has ended")
                await self._news.wait()

    async def shows(self, pattern: str, since: int) -> None:
        """Wait until the transcript from that offset on has the pattern, a regular expression."""
        compiled = re.compile(pattern.encode(), re.MULTILINE)
        await self.until(lambda: compiled.search(self.transcript, since) is not None)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _follow(self, client: Client, session: str) -> None:
        try:
            async with aclosing(client.stream(session)) as items:
                async for item in items:
                    async with self._news:
                        self._take(item)
                        self._news.notify_all()
        finally:
            async with self._news:
                self._news.notify_all()

    def _take(self, item: StreamedData | StreamedGap | StreamedEnd | SessionStatus) -> None:
        if isinstance(item, StreamedData):
            write(item.data)
            self.transcript += item.data
        elif isinstance(item, StreamedGap):
            tell_gap(item)
        elif isinstance(item, StreamedEnd):
            self.final_offset = item.final_offset
        else:
            self.states.append(item)


class _Script:
    """The steps, in their order; each leaves behind what the next ones need."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._session = ""
        self._screen: _Screen | None = None
        self.steps: tuple[tuple[str, Callable[[], Awaitable[None]]], ...] = (
            ("create a session", self.create),
            ("pip --version", self.pip),
            ("cd and a variable persist", self.persist),
            ("a Python REPL, typed into", self.repl),
            ("Ctrl-C ends an endless loop", self.interrupt),
            ("push a script and run it", self.push),
            ("read a file back", self.read_back),
            ("reconnect: the transcript is the same", self.reconnect),
            ("close", self.close),
        )

    @property
    def screen(self) -> _Screen:
        assert self._screen is not None, "the first step makes it"
        return self._screen

    async def create(self) -> None:
        self._session = (await self._client.create()).session_id
        self._screen = screen = _Screen(self._client, self._session)
        await screen.until(lambda: any(status.state in {SessionState.READY} | ENDED for status in screen.states))
        _expect(screen.states[-1].state is SessionState.READY, f"the session is {screen.states[-1].state}")

    async def pip(self) -> None:
        await self._run("pip --version", shows=r"^pip \d+\.")

    async def persist(self) -> None:
        await self._run("mkdir -p project && cd project && colour=green")
        await self._run('echo "$colour in ${PWD##*/}"', shows=r"^green in project")
        await self._run("cd ..")

    async def repl(self) -> None:
        since = len(self.screen.transcript)
        python = await self._submit("python3 -q")
        await self.screen.shows(r">>> ", since)
        await self._type("6 * 7\n")
        await self.screen.shows(r"^42\r", since)
        await self._type("import sys; print(sys.version_info >= (3,))\n")
        await self.screen.shows(r"^True\r", since)
        await self._type("exit()\n")
        await self._exits(python, 0)

    async def interrupt(self) -> None:
        since = len(self.screen.transcript)
        loop = await self._submit("while :; do echo round and round; sleep 0.2; done")
        await self.screen.shows(r"^round and round\r\nround and round", since)
        await self._type("\x03")
        await self._exits(loop, 130)

    async def push(self) -> None:
        pushed = await self._client.push(self._session, [{"path": "hello.py", "content": SCRIPT}])
        _expect(pushed.files == 1, f"{pushed.files} files were written")
        await self._run("python3 hello.py", shows=r"^hello from Python 3\.")

    async def read_back(self) -> None:
        file = await self._client.read_file(self._session, "result.txt")
        _expect(file.content == "forty-two\n", f"result.txt holds {file.content!r}")
        typer.echo(f"result.txt: {file.content!r}", err=True)

    async def reconnect(self) -> None:
        found = (await self._client.create(reconnect=True)).session_id
        _expect(found == self._session, f"another session was found: {found}")
        before, again = self.screen.transcript, bytearray()
        async with aclosing(self._client.stream(self._session)) as items:
            async for item in items:
                if isinstance(item, StreamedData):
                    again += item.data
                if len(again) >= len(before):
                    break
        _expect(bytes(again[: len(before)]) == before, "the transcript has changed")
        typer.echo(f"{len(before)} bytes, the same from offset 0", err=True)

    async def close(self) -> None:
        await self._client.close(self._session)
        screen = self.screen
        await screen.until(lambda: screen.final_offset is not None)
        _expect(screen.final_offset == len(screen.transcript), f"the end is at {screen.final_offset}")
        status = await self._client.status(self._session)
        _expect(status.state is SessionState.CLOSED, f"the session is {status.state}: {status.reason}")
        await self.stop()

    async def stop(self) -> None:
        """Leave nothing running, whatever happened."""
        if self._screen is not None:
            await self._screen.stop()
        if self._session:
            await self._client.close(self._session)

    async def _submit(self, text: str) -> str:
        return (await self._client.execute(self._session, text)).command_id

    async def _type(self, text: str) -> None:
        await self._client.send_input(self._session, text.encode())

    async def _run(self, text: str, *, shows: str = "") -> None:
        since = len(self.screen.transcript)
        await self._exits(await self._submit(text), 0)
        if shows:
            await self.screen.shows(shows, since)

    async def _exits(self, command_id: str, code: int) -> None:
        """Wait until the command has ended, and expect that code of it."""
        command = await self._client.ended(self._session, command_id)
        how = command.exit_code if command.exit_code is not None else command.reason
        holds = command.state is CommandState.EXITED and command.exit_code == code
        _expect(holds, f"`{command.command}` {command.state} {how}, expected {code}")


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise StepFailed(otherwise)
