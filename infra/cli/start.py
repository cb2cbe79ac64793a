"""`pigeon up`."""

from __future__ import annotations

import logging

import typer

from infra.local.up import ROLES, up
from infra.settings import Settings


def start(port: int | None, roles: str, user: str) -> int:
    """Run these roles (comma-separated) until a signal, the page being that user's; returns the exit status."""
    chosen = frozenset(role.strip() for role in roles.split(",") if role.strip())
    if not chosen or not chosen <= frozenset(ROLES):
        raise typer.BadParameter(f"'{roles}' is not made of {', '.join(ROLES)}", param_hint="--roles")
    settings = Settings.from_environment()
    if port is not None:
        settings = settings.model_copy(update={"port": port})
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return up(settings, chosen, user, typer.echo)
