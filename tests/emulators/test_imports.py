"""The embedded profile is pip and nothing else."""

from __future__ import annotations

import asyncio
import sys

PROGRAM = """
import sys
import infra.wiring, infra.cli, infra.local.up, infra.emulators
namespaces = {"google", "google.cloud"}  # of every process in an environment that has them
print(*(name for name in set(sys.modules) - namespaces if name.partition(".")[0] in ("grpc", "google")))
"""


async def test_the_clouds_clients_are_not_loaded_unasked() -> None:
    """Without the extra `gcp` everything but its own profiles works; with it, starting costs no more."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    assert output.decode().split() == []
