"""`pigeon tail`: the exact bytes of a transcript on stdout, everything else on stderr."""

from __future__ import annotations

import os
import sys
from contextlib import aclosing

import typer

from infra.cli.common import describe
from infra.cli.printable import printable
from infra.client import Client
from schemas.http import SessionStatus, StreamedData, StreamedGap
from schemas.lifecycle import ENDED


async def tail(client: Client, session: str) -> int:
    """Print what there is and what comes until the session ends; returns the exit status."""
    async with aclosing(client.stream(session)) as items:
        async for item in items:
            if isinstance(item, StreamedData):
                write(item.data)
            elif isinstance(item, StreamedGap):
                tell_gap(item)
            elif isinstance(item, SessionStatus) and item.state in ENDED:
                typer.echo(f"pigeon: {describe(item)}", err=True)
    return 0


def tell_gap(gap: StreamedGap) -> None:
    """Say that bytes are missing."""
    size = "an unknown number of" if gap.length is None else gap.length
    typer.echo(f"pigeon: {size} bytes of output were given up ({printable(gap.reason)})", err=True)


def write(data: bytes) -> None:
    """Write all of it to stdout, now. Raises BrokenPipeError where nobody reads."""
    sys.stdout.flush()
    view = memoryview(data)
    while view:
        view = view[os.write(sys.stdout.fileno(), view) :]
