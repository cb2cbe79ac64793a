"""A process of its own that creates or claims a sandbox: `python -m tests.contracts.sandboxes_child REQUEST`.

It says "ready", waits for a line, does what it was asked for, says how it went, and waits to be killed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from infra.local.sandboxes import LocalSandboxes
from schemas.errors import PigeonError
from schemas.limits import Limits
from schemas.ports import SandboxSpec


async def work(request: dict[str, Any]) -> str:
    """Do it; returns "done" or the error's code."""
    sandboxes = LocalSandboxes(
        Path(request["root"]),
        limits=Limits(capacity=request["capacity"]),
        network="none",
        unsafe=request["unsafe"],
        python=Path(request["python"]),
    )
    try:
        if "spec" in request:
            await sandboxes.create(SandboxSpec(**request["spec"]))
        else:
            await sandboxes.claim(**request["claim"])
    except PigeonError as error:
        return error.code
    return "done"


def main() -> None:
    """Take the request from the command line."""
    print("ready", flush=True)
    sys.stdin.readline()
    print(asyncio.run(work(json.loads(sys.argv[1]))), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
