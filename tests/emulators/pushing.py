"""What Google adds to a push and the emulator does not: a signed token, and the keys to check it with."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from consumers.push import PushServices, answer
from infra.adapters.push import GOOGLE_ISSUER, PushIdentity
from infra.clock import SystemClock
from schemas.ports import Clock, Message, Subscription
from tests.producers.world import served

AUDIENCE = "https://push.example"
ACCOUNT = "pusher@project.iam.example"
KEY_ID = "key-1"


class Issuer:
    """Signs tokens as Google does."""

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def token(self, *, key_id: str = KEY_ID, **changes: Any) -> str:
        """A good token but for these claims; None leaves one out."""
        now = datetime.now(UTC)
        claims = {
            "iss": GOOGLE_ISSUER,
            "aud": AUDIENCE,
            "sub": "1",
            "email": ACCOUNT,
            "email_verified": True,
            "iat": now,
            "exp": now + timedelta(minutes=5),
            **changes,
        }
        kept = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(kept, self._key, algorithm="RS256", headers={"kid": key_id})

    def keys(self) -> dict[str, Any]:
        """Its key set."""
        key = jwt.algorithms.RSAAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        return {"keys": [{**key, "kid": KEY_ID, "alg": "RS256", "use": "sig"}]}

    @asynccontextmanager
    async def identity(self, clock: Clock | None = None) -> AsyncIterator[PushIdentity]:
        """A verifier that fetches the key set over HTTP."""
        async with self.serving() as url:
            yield PushIdentity(clock or SystemClock(), audience=AUDIENCE, service_account=ACCOUNT, keys_url=url)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """The key set's URL."""
        app = Starlette(routes=[Route("/keys", self._serve_keys)])
        async with served(app) as url:
            yield f"{url}/keys"

    async def _serve_keys(self, request: Request) -> Response:
        return JSONResponse(self.keys())


def wrapped(message: Message, *, attempt: int = 1) -> bytes:
    """The body of a wrapped push, as the service sends it: the old names of fields are there, too."""
    pushed = {
        "data": base64.b64encode(message.data).decode(),
        "attributes": dict(message.attributes),
        "messageId": "17",
        "message_id": "17",
        "publishTime": "2026-01-02T03:04:05.678Z",
        "publish_time": "2026-01-02T03:04:05.678Z",
        "orderingKey": message.ordering_key,
    }
    body = {"message": pushed, "subscription": "projects/p/subscriptions/s", "deliveryAttempt": attempt}
    return json.dumps(body).encode()


@asynccontextmanager
async def functions(services: PushServices, subscriptions: list[Subscription], issuer: Issuer) -> AsyncIterator[str]:
    """The push functions behind a door that adds the token; each is at its subscription's name."""

    def route(subscription: Subscription) -> Route:
        async def serve(request: Request) -> Response:
            request.scope["headers"] = [
                *request.scope["headers"],
                (b"authorization", f"Bearer {issuer.token()}".encode()),
            ]
            return await answer(services, subscription, Request(request.scope, request.receive))

        return Route(f"/{subscription.name}", serve, methods=["POST"])

    async with served(Starlette(routes=[route(subscription) for subscription in subscriptions])) as url:
        yield url
