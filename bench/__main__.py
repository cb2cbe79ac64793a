"""`python -m bench`: every figure in one run, side by side. See bench/README.md."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from bench import commands, flood, floors, keystrokes, peers, pigeon, replay, starts
from bench.emulators import Emulators, Skipped, emulators
from bench.report import Figure, table
from bench.terminals import Terminal, calm
from infra.local.sandbox_python import ensure_python
from schemas.limits import MIB

if TYPE_CHECKING:
    from bench.pods import Pods


@dataclass
class Bench:
    """What the parts share, each piece made when a part first asks for it."""

    folder: Path
    quick: bool
    held: ExitStack = field(default_factory=ExitStack)

    @cached_property
    def python(self) -> Path:
        """The Python of all sandboxes."""
        return ensure_python(self.folder)

    @cached_property
    def stack(self) -> pigeon.Stack:
        """The stack that most parts use, with a warm sandbox."""
        return self.held.enter_context(pigeon.stack(self.folder / "warm", self.python, pool_size=1))

    @cached_property
    def cold(self) -> pigeon.Stack:
        """A stack without a pool."""
        return self.held.enter_context(pigeon.stack(self.folder / "cold", self.python, pool_size=0))

    @cached_property
    def emulators(self) -> Emulators:
        """Google's emulators. Raises Skipped where there are none; what needs their clients is imported after it."""
        return self.held.enter_context(emulators())

    @cached_property
    def emulated(self) -> tuple[str, pigeon.Stack]:
        """A stack on the emulators, and its project."""
        project = self.emulators.project()
        variables = self.emulators.variables(project)
        folder = self.folder / "emulated"
        return project, self.held.enter_context(pigeon.stack(folder, self.python, emulators=variables, pool_size=0))

    def namespace(self, name: str) -> Pods:
        """A namespace of a real cluster. Raises Skipped where there is none; what needs its client is imported then."""
        try:
            from bench.pods import pods
        except ImportError as error:
            raise Skipped(str(error)) from error
        return self.held.enter_context(pods(self.folder / name))

    def on_pods(self, pods: Pods, **limits: int) -> pigeon.Stack:
        """A stack whose sandboxes are pods there."""
        folder = Path(tempfile.mkdtemp(dir=self.folder)) / "stack"
        return self.held.enter_context(pigeon.stack(folder, self.python, emulators=pods.variables(), **limits))

    @cached_property
    def terminals(self) -> Sequence[Terminal]:
        """Ours, its agent alone, and the peers, each at its prompt."""
        session = pigeon.Session(self.stack)
        session.start()
        self.held.callback(session.close)
        calm(session)
        found = [
            session,
            self.held.enter_context(floors.agent(self.folder, self.python)),
            self.held.enter_context(peers.terminado("terminado")),
            self.held.enter_context(peers.terminado("terminado, nodelay", "nodelay")),
            self.held.enter_context(peers.ttyd()),
        ]
        return [terminal for terminal in found if terminal is not None]

    def scaled(self, count: int) -> int:
        """How often to measure: a tenth for a quick look."""
        return max(3, count // 10) if self.quick else count


def _floors(bench: Bench) -> Iterator[Figure]:
    return floors.measure(bench.stack, bench.folder / "floors", count=bench.scaled(1000))


def _echo(bench: Bench) -> Iterator[Figure]:
    return keystrokes.measure(bench.terminals, count=bench.scaled(1000))


def _commands(bench: Bench) -> Iterator[Figure]:
    return commands.measure(bench.terminals, count=bench.scaled(300))


def _flood(bench: Bench) -> Iterator[Figure]:
    last = 500_000 if bench.quick else 5_000_000
    return flood.measure(bench.terminals, last=last, rounds=1 if bench.quick else 5)


def _starts(bench: Bench) -> Iterator[Figure]:
    return starts.measure(bench.stack, bench.cold, count=bench.scaled(20))


def _memory(bench: Bench) -> Iterator[Figure]:
    return starts.measure_memory(bench.stack, count=bench.scaled(10))


def _replay(bench: Bench) -> Iterator[Figure]:
    return replay.measure(bench.stack, count=bench.scaled(50))


def _bus(bench: Bench) -> Iterator[Figure]:
    held = bench.emulators
    from bench import bus

    return bus.measure(held, count=bench.scaled(400))


def _listeners(bench: Bench) -> Iterator[Figure]:
    held = bench.emulators
    from bench import listeners

    return listeners.measure(held, count=bench.scaled(400))


def _chunks(bench: Bench) -> Iterator[Figure]:
    held = bench.emulators
    from bench import chunks

    return chunks.measure(held, rounds=bench.scaled(7))


def _hops(bench: Bench) -> Iterator[Figure]:
    project, emulated = bench.emulated
    from bench import hops

    yield from hops.measure(bench.emulators, project, emulated, bench.cold, count=bench.scaled(200))
    last = 500_000 if bench.quick else 2_000_000
    yield from hops.measure_floods(emulated, bench.cold, last=last, rounds=1 if bench.quick else 3)


def _bill(bench: Bench) -> Iterator[Figure]:
    held = bench.emulators
    from bench import bill

    return bill.measure(held, bench.folder / "bill", bench.python, count=bench.scaled(20))


def _lag(bench: Bench) -> Iterator[Figure]:
    held = bench.emulators
    from bench import lag

    commands, last = (80, 500_000) if bench.quick else (400, 2_000_000)
    return lag.measure(held, bench.folder / "lag", bench.python, commands=commands, last=last)


def _pods(bench: Bench) -> Iterator[Figure]:
    pods, pool = bench.namespace("pods"), bench.namespace("pool")
    from bench import pod_starts

    cold, warm = bench.on_pods(pods, pool_size=0), bench.on_pods(pool, pool_size=1)
    return pod_starts.measure(pods, cold, pool, warm, count=bench.scaled(8))


def _execs(bench: Bench) -> Iterator[Figure]:
    pods = bench.namespace("execs")
    from bench import pod_execs

    stack = bench.on_pods(pods, pool_size=0)
    yield from pod_execs.measure_echo(pods, stack, attaches=bench.scaled(30), keys=bench.scaled(300))
    last, rounds = (100_000, 3) if bench.quick else (300_000, 4)
    yield from pod_execs.measure_floods(pods, stack, "small", last=last, rounds=rounds)
    large = bench.on_pods(pods, pool_size=0, memory_bytes=1024 * MIB)
    yield from pod_execs.measure_floods(pods, large, "large", last=5 * last, rounds=rounds)


def _crowd(bench: Bench) -> Iterator[Figure]:
    pods = bench.namespace("crowd")
    from bench import pod_crowd

    return pod_crowd.measure(pods, sessions=20 if bench.quick else 200, seconds=20.0 if bench.quick else 40.0)


PARTS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "echo": _echo,
    "commands": _commands,
    "flood": _flood,
    "starts": _starts,
    "memory": _memory,
    "replay": _replay,
    "floors": _floors,
    "bus": _bus,
    "listeners": _listeners,
    "chunks": _chunks,
    "hops": _hops,
    "bill": _bill,
    "lag": _lag,
    "pods": _pods,
    "execs": _execs,
    "crowd": _crowd,
}


def main() -> None:
    """Measure what was asked for and print the table."""
    options = _options()
    began, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="pigeon-bench-") as folder, ExitStack() as held:
        bench = Bench(Path(folder), options.quick, held)
        figures: list[Figure] = []
        for name in options.only or PARTS:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            try:
                figures += PARTS[name](bench)
            except Skipped as reason:
                print(f"{name} is skipped: {reason}", file=sys.stderr)
    print(table(figures))
    machine = {
        "cores": os.cpu_count(),
        "loadBefore": round(load, 1),
        "loadAfter": round(os.getloadavg()[0], 1),
        "seconds": round(time.monotonic() - began),
    }
    print("\n{cores} cores, load {loadBefore} before and {loadAfter} after, {seconds} s in all".format(**machine))
    if options.json:
        document = {"machine": machine, "figures": [figure.as_json() for figure in figures]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure pigeon beside its peers.")
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; may be repeated (default: all)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
