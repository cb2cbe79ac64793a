"""The composition root: the one place where ports meet adapters."""

from __future__ import annotations

import asyncio
import functools
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from consumers.context import Context
from consumers.controls import Controls
from consumers.push import PushServices, set_at_sigterm
from infra.adapters.push import PushIdentity
from infra.clock import SystemClock
from infra.local.keys import SECRET_BYTES, token_secret, worker_secret
from infra.profiles import PROFILES, Ports
from infra.runtimes import RUNTIMES, Runtime
from infra.settings import Settings
from producers.identity import AnyOf, LocalIdentity, SupabaseIdentity
from producers.services import Services
from schemas.errors import Malformed
from schemas.ports import Identity


@dataclass(frozen=True, slots=True, eq=False)  # each is itself, and may be a key
class Backends:
    """What every process of a deployment shares: messages, documents and their time."""

    settings: Settings
    ports: Ports


@asynccontextmanager
async def backends(settings: Settings) -> AsyncIterator[Backends]:
    """Open the bus and the store of this deployment; closes them on the way out.

    Raises StoreUnavailable, UnknownSchema, ClientsMissing, EmulatorMissing or Unavailable where they cannot be had.
    """
    async with PROFILES[settings.profile](settings, SystemClock()) as ports:
        gc.freeze()  # what is loaded by now stays; to go through it holds up the loop for 30 to 60 ms at a time
        yield Backends(settings, ports)


def services(backends: Backends) -> Services:
    """What the HTTP functions need. Raises InsecureSecret, or Malformed where nothing says whose tokens are good."""
    return Services(
        store=backends.ports.store,
        bus=backends.ports.bus,
        identity=identity(backends.settings),
        clock=backends.ports.clock,
        limits=backends.settings.limits,
        minter=backends.ports.minter,
        allowed_origins=frozenset(backends.settings.allowed_origins),
        source="/producers",
    )


def identity(settings: Settings) -> Identity:
    """Whose tokens are good: Supabase's where it is set, and off the cloud also those that this machine signs.

    Raises InsecureSecret, or Malformed where there would be none.
    """
    supabase = _supabase(settings)
    if settings.profile == "gcp":
        if supabase is None:
            raise Malformed("PIGEON_SUPABASE_JWKS_URL: in the cloud it says whose tokens are good")
        return supabase
    local = LocalIdentity(token_secret(settings.state))  # the page and the command `pigeon` on this machine
    return local if supabase is None else AnyOf(local, supabase)


def _supabase(settings: Settings) -> Identity | None:
    if not (settings.supabase_jwks_url or settings.supabase_jwt_secret):
        return None
    return SupabaseIdentity(
        issuer=settings.supabase_issuer,
        audience=settings.token_audience,
        jwks_url=settings.supabase_jwks_url,
        secret=settings.supabase_jwt_secret,
    )


@dataclass(frozen=True, slots=True, eq=False)  # each is itself, and may be a key
class Workshop:
    """What a worker has beside the backends: where user code runs, and what its handlers are given."""

    settings: Settings
    runtime: Runtime
    context: Context


@asynccontextmanager
async def workshop(backends: Backends) -> AsyncIterator[Workshop]:
    """Open the sandboxes of this deployment; closes the connection to them on the way out, and ends none.

    Raises InsecureSecret, Malformed, ClientsMissing or Unavailable.
    """
    settings = backends.settings
    secret = await asyncio.to_thread(agent_secret, settings)
    async with RUNTIMES[settings.sandboxes](settings) as runtime:
        context = Context(
            store=backends.ports.store,
            bus=backends.ports.bus,
            sandboxes=runtime,
            clock=backends.ports.clock,
            limits=settings.limits,
            controls=Controls(runtime, secret),
            notice=notice(settings),
        )
        yield Workshop(settings, runtime, context)


def agent_secret(settings: Settings) -> bytes:
    """The key from which each session's agent key is derived: every worker of a deployment has the same.

    Raises InsecureSecret, or Malformed for a setting that is none.
    """
    text = settings.worker_secret.get_secret_value()
    if not text and settings.profile != "gcp":
        return worker_secret(settings.state)
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise Malformed(f"PIGEON_WORKER_SECRET: {SECRET_BYTES} bytes in hexadecimal, the same for every worker")
    return secret


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
    return _push_services(await asyncio.shield(_equipping()))


_services = functools.cache(services)


@functools.cache
def _push_services(opened: Workshop) -> PushServices:
    settings = opened.settings
    pusher = PushIdentity(
        opened.context.clock,
        audience=settings.push_audience,
        service_account=settings.push_service_account,
        keys_url=settings.push_keys_url,
    )
    made = PushServices(opened.context, pusher)
    set_at_sigterm(made.stopping)
    return made


@functools.cache
def _opening() -> asyncio.Task[Backends]:
    opening = asyncio.create_task(_kept.enter_async_context(backends(Settings.from_environment())))
    opening.add_done_callback(functools.partial(_forget_failure, _opening.cache_clear))
    return opening


@functools.cache
def _equipping() -> asyncio.Task[Workshop]:
    equipping = asyncio.create_task(_equip())
    equipping.add_done_callback(functools.partial(_forget_failure, _equipping.cache_clear))
    return equipping


async def _equip() -> Workshop:
    return await _kept.enter_async_context(workshop(await asyncio.shield(_opening())))


def _forget_failure(forget: Callable[[], None], opening: asyncio.Task[Any]) -> None:
    if opening.cancelled() or opening.exception() is not None:
        forget()
