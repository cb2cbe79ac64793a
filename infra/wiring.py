"""The composition root: the one place where ports meet adapters."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from consumers.context import Context
from consumers.controls import Controls
from consumers.push import PushServices
from consumers.worker import Worker
from infra.adapters.push import PushIdentity
from infra.clock import SystemClock
from infra.local.keys import token_secret, worker_secret
from infra.local.sandboxes import LocalSandboxes
from infra.profiles import PROFILES, Prune
from infra.settings import Settings
from producers.identity import AnyOf, LocalIdentity, SupabaseIdentity
from producers.services import Services
from schemas.ports import Bus, Clock, Identity, Minter, Store

SANDBOXES_FOLDER = "sandboxes"


@dataclass(frozen=True, slots=True)
class Backends:
    """The adapters of one process."""

    settings: Settings
    clock: Clock
    store: Store
    bus: Bus
    prune: Prune | None
    minter: Minter | None
    sandboxes: LocalSandboxes
    identity: Identity
    secret: bytes


@asynccontextmanager
async def backends(settings: Settings) -> AsyncIterator[Backends]:
    """Open what a process of this deployment needs; closes it on the way out.

    Raises InsecureSecret, StoreUnavailable or UnknownSchema where the state folder is not usable.
    """
    clock = SystemClock()
    secret = await asyncio.to_thread(worker_secret, settings.state)
    identity = await asyncio.to_thread(_identity, settings)
    async with PROFILES[settings.profile](settings, clock) as ports:
        yield Backends(
            settings=settings,
            clock=clock,
            store=ports.store,
            bus=ports.bus,
            prune=ports.prune,
            minter=ports.minter,
            sandboxes=LocalSandboxes(
                settings.state / SANDBOXES_FOLDER,
                limits=settings.limits,
                network=settings.network,
                unsafe=settings.unsafe_no_sandbox,
                python=settings.python,
            ),
            identity=identity,
            secret=secret,
        )


def _identity(settings: Settings) -> Identity:
    local = LocalIdentity(token_secret(settings.state))  # the page and the command `pigeon` on this machine
    if not (settings.supabase_jwks_url or settings.supabase_jwt_secret):
        return local
    supabase = SupabaseIdentity(
        issuer=settings.supabase_issuer,
        audience=settings.token_audience,
        jwks_url=settings.supabase_jwks_url,
        secret=settings.supabase_jwt_secret,
    )
    return AnyOf(local, supabase)


def services(backends: Backends) -> Services:
    """What the HTTP functions need."""
    return Services(
        store=backends.store,
        bus=backends.bus,
        identity=backends.identity,
        clock=backends.clock,
        limits=backends.settings.limits,
        minter=backends.minter,
        allowed_origins=frozenset(backends.settings.allowed_origins),
        source="/producers",
    )


def worker(backends: Backends) -> Worker:
    """A worker of this process, ready to run."""
    return Worker(context(backends))


def context(backends: Backends) -> Context:
    """What the handlers need."""
    return Context(
        store=backends.store,
        bus=backends.bus,
        sandboxes=backends.sandboxes,
        clock=backends.clock,
        limits=backends.settings.limits,
        controls=Controls(backends.sandboxes, backends.secret),
        notice=notice(backends.settings),
    )


def notice(settings: Settings) -> str:
    """The first line of every session where its isolation is less than the default; "" where it is not."""
    if settings.unsafe_no_sandbox:
        return "WARNING: no sandbox here. What runs in this session can do whatever the server's user can."
    if settings.network == "host":
        return "This session shares the network of its host."
    return ""


_kept = AsyncExitStack()  # what is collected is closed


async def producer_services() -> Services:
    """The services of this process, opened at first use and kept for its life: a function instance has no end hook.

    Raises what opening them raises; the next call tries again.
    """
    return _services(await asyncio.shield(_opening()))


async def push_services() -> PushServices:
    """What the push functions need; as `producer_services`. Raises ValueError where nobody is allowed to push."""
    return _push_services(await asyncio.shield(_opening()))


_services = functools.cache(services)


@functools.cache
def _push_services(opened: Backends) -> PushServices:
    settings = opened.settings
    pusher = PushIdentity(
        audience=settings.push_audience,
        service_account=settings.push_service_account,
        keys_url=settings.push_keys_url,
    )
    return PushServices(context(opened), pusher)


@functools.cache
def _opening() -> asyncio.Task[Backends]:
    opening = asyncio.create_task(_kept.enter_async_context(backends(Settings.from_environment())))
    opening.add_done_callback(_forget_failure)
    return opening


def _forget_failure(opening: asyncio.Task[Backends]) -> None:
    if opening.cancelled() or opening.exception() is not None:
        _opening.cache_clear()
