"""Where user code runs: processes of this machine, or pods."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from infra.local.sandboxes import LocalSandboxes
from infra.profiles import ClientsMissing
from infra.settings import Settings
from schemas.ports import Sandboxes

SANDBOXES_FOLDER = "sandboxes"


class Runtime(Sandboxes, Protocol):
    """A Sandboxes that a process opens once, and asks at its start what isolates sessions in it."""

    async def check_isolation(self) -> str:
        """Try it, and say in a few words what isolates sessions. Raises SandboxFailed, with what to do, or
        Unavailable."""


@asynccontextmanager
async def local(settings: Settings) -> AsyncIterator[Runtime]:
    """Bubblewrap processes of this machine, kept in the state folder."""
    yield LocalSandboxes(
        settings.state / SANDBOXES_FOLDER,
        limits=settings.limits,
        network=settings.network,
        unsafe=settings.unsafe_no_sandbox,
        python=settings.python,
    )


@asynccontextmanager
async def kubernetes(settings: Settings) -> AsyncIterator[Runtime]:
    """Pods of the cluster that `settings.kube` names. Raises ClientsMissing, or Unavailable without a cluster."""
    try:
        from infra.adapters.kube import kube_sandboxes
    except ImportError as error:
        raise ClientsMissing("this environment lacks the Kubernetes client: requirements-gcp.lock has it") from error
    async with kube_sandboxes(settings.kube) as sandboxes:
        yield sandboxes


RUNTIMES: Mapping[str, Callable[[Settings], AbstractAsyncContextManager[Runtime]]] = {
    "local": local,
    "kubernetes": kubernetes,
}
