"""An emulator of a test's own, which can be frozen, killed and started again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO

from infra.emulators import EmulatorMissing, Kind, end, free_port, launch
from tests.emulators.fixtures import absent
from tests.waiting import until

START_SECONDS = 60.0


class Machine:
    """One emulator on one port, and the processes that it is made of."""

    def __init__(self, kind: Kind, rules: Path | None = None) -> None:
        self._kind = kind
        self._rules = rules
        self._port = free_port()
        self._keeper: asyncio.subprocess.Process | None = None
        self._log: IO[bytes] | None = None

    @property
    def host(self) -> str:
        """Its "host:port", the same after each start."""
        return f"127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Return once it answers; skips or fails the test where there is nothing to start."""
        try:
            self._keeper, self._log = await launch(self._kind, self._port, self._rules)
        except EmulatorMissing as error:
            absent(error)
        await until(self._answers, f"the {self._kind.name} emulator answers", START_SECONDS)

    async def kill(self) -> None:
        """kill -9, of everything that it is made of; what it knew is gone."""
        self._signal(signal.SIGKILL)
        await self.end()

    async def end(self) -> None:
        """In good order."""
        if self._keeper is not None and self._log is not None:
            await end(self._keeper)
            self._log.close()
            self._keeper = self._log = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It answers nobody and forgets nothing; connections stay open."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._keeper is not None
        os.killpg(self._keeper.pid, number)  # `launch` gives it a session, and with it a group, of its own

    async def _answers(self) -> bool:
        assert self._keeper is not None
        assert self._keeper.returncode is None, "the emulator ended"
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            return False
        writer.close()
        return True


@asynccontextmanager
async def machine(kind: Kind, rules: Path | None = None) -> AsyncIterator[Machine]:
    """Started, and ended with the context."""
    own = Machine(kind, rules)
    await own.start()
    try:
        yield own
    finally:
        await own.end()
