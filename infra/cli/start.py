"""`pigeon up` and `pigeon worker`."""

from __future__ import annotations

import asyncio
import logging

import typer

from infra.local.up import ROLES, up
from infra.settings import Settings
from infra.worker import serve


def start(port: int | None, roles: str, user: str) -> int:
    """Run these roles (comma-separated) until a signal, the page being that user's; returns the exit status."""
    chosen = frozenset(role.strip() for role in roles.split(",") if role.strip())
    if not chosen or not chosen <= frozenset(ROLES):
        raise typer.BadParameter(f"'{roles}' is not made of {', '.join(ROLES)}", param_hint="--roles")
    settings = Settings.from_environment()
    if port is not None:
        settings = settings.model_copy(update={"port": port})
    _log(logging.WARNING)
    return up(settings, chosen, user, typer.echo)


def start_worker() -> int:
    """Work until a signal; returns the exit status."""
    settings = Settings.from_environment()
    _log(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # which answers probes only
    return asyncio.run(serve(settings, typer.echo))


def _log(level: int) -> None:
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
