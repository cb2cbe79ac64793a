"""What opening a deployment's backends does to the process that opens them."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

OPEN = """
import asyncio, gc, pathlib, sys
from infra.settings import Settings
from infra.wiring import backends

async def main():
    async with backends(Settings(state=pathlib.Path(sys.argv[1]))):
        print(gc.get_freeze_count(), len(gc.get_objects()))

asyncio.run(main())
"""


async def test_a_collection_of_garbage_does_not_go_through_all_that_is_loaded(tmp_path: Path) -> None:
    """It would hold up every session of the process at once, for longer than a keystroke may take."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    command = [sys.executable, "-c", OPEN, str(state)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    spared, left = map(int, output.split())
    assert spared > 10 * left
