"""The gateway's application on a store of its own: everything but the worker and the socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import httpx
import pytest

from infra.local.gateway import Access, gateway
from infra.local.guard import Guard
from infra.local.keys import token_secret
from infra.settings import Settings
from infra.wiring import backends, services
from producers.identity import sign_local_token
from producers.routes import routes

PORT = 8080
ALLOWED = "https://terminal.example"


@dataclass
class Door:
    """A gateway, and a browser in front of it."""

    guard: Guard
    access: Access
    browser: httpx.AsyncClient
    secret: bytes

    def token(self, user: str = "alice") -> str:
        """An access token of this machine."""
        return sign_local_token(self.secret, user, timedelta(minutes=1))

    async def enter(self, user: str = "alice") -> None:
        """Let the browser in as that user."""
        response = await self.browser.get(self.access.address(user))
        assert response.status_code == 303
        assert response.headers["location"] == "/"


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    """A gateway that says it listens on PORT, with a browser that has no cookie yet."""
    settings = Settings(state=tmp_path, allowed_origins=(ALLOWED,))
    async with backends(settings) as opened:
        secret = token_secret(tmp_path)
        access = Access(secret, opened.ports.clock, port=PORT)
        guard = gateway(routes(services(opened)), access, allowed_origins=settings.allowed_origins)
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://127.0.0.1:{PORT}") as browser:
            yield Door(guard, access, browser, secret)
