"""The command `pigeon` as people use it: processes, with what they print and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.local.presence import Presence, find

START_SECONDS = 60.0
COMMAND_SECONDS = 60.0
LOOK_SECONDS = 0.02


class Pigeon:
    """`pigeon` with one state folder. `environment` adds to this process's own."""

    def __init__(self, state: Path, **environment: str) -> None:
        self.state = state
        self.environment = {**os.environ, "PIGEON_STATE": str(state), **environment}
        for name in ("PIGEON_URL", "PIGEON_TOKEN"):
            self.environment.pop(name, None)

    @contextmanager
    def background(self, *arguments: str, stdin: bytes = b"") -> Iterator[Background]:
        """A subcommand in the background; it is killed if it outlives the context."""
        process = subprocess.Popen(
            [sys.executable, "-m", "infra.cli", *arguments],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with process:
            try:
                assert process.stdin is not None
                process.stdin.write(stdin)
                process.stdin.close()
                process.stdin = None
                yield Background(process)
            finally:
                process.kill()

    def run(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """A subcommand to its end."""
        with self.background(*arguments, stdin=stdin) as process:
            return process.end()

    @contextmanager
    def up(self, *arguments: str) -> Iterator[Background]:
        """A running stack; whatever happens, it is ended as Ctrl-C ends it."""
        with self.background("up", "--port", "0", *arguments) as stack:
            try:
                self.presence(stack)
                yield stack
            finally:
                if stack.runs():
                    stack.signal(signal.SIGINT)
                    stack.end()

    def presence(self, stack: Background) -> Presence:
        """Wait until the gateway of that process listens."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and stack.runs():
            presence = find(self.state)
            if presence is not None and presence.pid == stack.pid:
                return presence
            time.sleep(LOOK_SECONDS)  # another process's file: there is nothing to await
        raise AssertionError(f"pigeon up did not start: {stack.end()}")


class Background:
    """A process that runs."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid

    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def line(self) -> bytes:
        """The next line of stdout; b"" at its end."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close_stdout(self) -> None:
        """Read no more of what it prints."""
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.stdout = None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def end(self, patience: float = COMMAND_SECONDS) -> subprocess.CompletedProcess[bytes]:
        """Wait for its end; what it has printed since the last line."""
        out, err = self._process.communicate(timeout=patience)
        return subprocess.CompletedProcess(self._process.args, self._process.returncode, out or b"", err)


def error_line(result: subprocess.CompletedProcess[bytes]) -> str:
    """What it said on stderr, which must be one line."""
    lines = result.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    return lines[0]
