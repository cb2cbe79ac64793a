"""Google's emulators for the parts that are measured on them, and the loop on which those run."""

from __future__ import annotations

import asyncio
import os
import urllib.request
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

from infra.emulators import EmulatorMissing, firestore_emulator, pubsub_emulator

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")  # before gRPC is imported; our children exec at once

T = TypeVar("T")


class Skipped(Exception):
    """A part cannot be measured here; the message says why."""


@dataclass(frozen=True, slots=True)
class Emulators:
    """Where they answer. They run as long as their runner's loop is kept."""

    runner: asyncio.Runner
    pubsub: str
    firestore: str

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it to its end on the emulators' loop."""
        return self.runner.run(work)

    @staticmethod
    def project() -> str:
        """A project that nobody else uses: cost grows with the documents of a project."""
        return f"bench-{uuid4().hex[:20]}"

    def forget(self, project: str) -> None:
        """Delete all its documents, which the emulator holds in memory."""
        url = f"http://{self.firestore}/emulator/v1/projects/{project}/databases/(default)/documents"
        urllib.request.urlopen(urllib.request.Request(url, method="DELETE")).close()

    def variables(self, project: str) -> dict[str, str]:
        """What a process of the emulators profile is told."""
        return {
            "PIGEON_PROFILE": "emulators",
            "PIGEON_PROJECT": project,
            "PUBSUB_EMULATOR_HOST": self.pubsub,
            "FIRESTORE_EMULATOR_HOST": self.firestore,
        }


@contextmanager
def emulators() -> Iterator[Emulators]:
    """Those that run already, or our own. Raises Skipped where there are none."""
    with asyncio.Runner() as runner:
        held = AsyncExitStack()
        try:
            pubsub, firestore = runner.run(_start(held))
        except (EmulatorMissing, ImportError) as error:
            runner.run(held.aclose())
            raise Skipped(str(error)) from error
        try:
            yield Emulators(runner, pubsub, firestore)
        finally:
            runner.run(held.aclose())


async def _start(held: AsyncExitStack) -> tuple[str, str]:
    import grpc.aio  # noqa: F401 - the parts need Google's clients; say so before anything is started

    return await held.enter_async_context(pubsub_emulator()), await held.enter_async_context(firestore_emulator())


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Something that runs on while the context lasts."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
