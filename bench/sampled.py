"""A worker in a process of its own, on the emulators, that says how long its event loop was held up, and by what.

`python -m bench.sampled FOLDER PYTHON PUBSUB FIRESTORE PROJECT` answers each line on its standard input with what it
has seen since the last one, as a line of JSON; it ends when the input does.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.counted import Place, working
from bench.emulators import beside

SAMPLE_SECONDS = 0.005


@dataclass
class Samples:
    """How late the loop was each time it was asked to wake up, and the CPU of each kind of callback, in seconds."""

    lags: list[float] = field(default_factory=list)
    callbacks: dict[str, list[float]] = field(default_factory=dict)

    async def sample(self) -> None:
        """Runs until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            due = clock() + SAMPLE_SECONDS
            await asyncio.sleep(SAMPLE_SECONDS)
            self.lags.append(clock() - due)

    def watch_callbacks(self) -> None:
        """From now on, for the life of the process. The thread's own CPU: what others use does not count."""
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            began = time.thread_time()
            name = _name(handle._callback)  # type: ignore[attr-defined]
            run(handle)
            self.callbacks.setdefault(name, []).append(time.thread_time() - began)

        setattr(asyncio.Handle, "_run", timed)  # noqa: B010 - asyncio has no hook for it

    def taken(self) -> dict[str, Any]:
        """Everything since the last time."""
        taken = {"lags": self.lags, "callbacks": self.callbacks, "cpu": time.process_time()}
        self.lags, self.callbacks = [], {}
        return taken


def _name(callback: Any) -> str:
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        coroutine = owner.get_coro()
        return str(getattr(coroutine, "__qualname__", coroutine))
    callback = getattr(callback, "func", callback)  # of a partial
    return str(getattr(callback, "__qualname__", callback))


async def main() -> None:
    """Work until the input ends."""
    folder, python, pubsub, firestore, project = sys.argv[1:]
    place = Place(Path(folder), Path(python), pubsub, firestore, project)
    samples = Samples()
    samples.watch_callbacks()
    async with place.store() as store, place.bus() as bus, working(place, store, bus), beside(samples.sample()):
        print("{}", flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(samples.taken()), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
