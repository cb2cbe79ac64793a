"""A process of its own that creates or claims a pod: `python -m tests.kube.child REQUEST`.

It says "ready" once it has reached the cluster, waits for a line, does what it was asked for, says how it went, and
waits to be killed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from infra.adapters.kube import kube_sandboxes
from infra.adapters.kube_settings import KubeSettings
from schemas.errors import PigeonError
from schemas.ports import SandboxSpec


async def work(request: dict[str, Any]) -> None:
    """Do it; tells "done" or the error's code."""
    async with kube_sandboxes(KubeSettings(**request["settings"])) as sandboxes:
        await sandboxes.list()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        try:
            if "spec" in request:
                await sandboxes.create(SandboxSpec(**request["spec"]))
            else:
                await sandboxes.claim(**request["claim"])
            print("done", flush=True)
        except PigeonError as error:
            print(error.code, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(work(json.loads(sys.argv[1])))
