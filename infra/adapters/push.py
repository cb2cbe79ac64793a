"""Who pushes: the OIDC token that Pub/Sub puts on its push requests."""

from __future__ import annotations

from typing import Any

import jwt

from producers.jwks import Jwks
from schemas.errors import Forbidden, Unauthenticated
from schemas.limits import MAX_TOKEN_BYTES

GOOGLE_ISSUER = "https://accounts.google.com"
GOOGLE_KEYS = "https://www.googleapis.com/oauth2/v3/certs"
LEEWAY_SECONDS = 10
REQUIRED = ["exp", "iat", "aud", "iss", "sub"]


class PushIdentity:
    """Accepts tokens that Google issued to one service account for one audience, and nothing else.

    Source: "Authentication for push subscriptions" in Pub/Sub's documentation. Raises ValueError where the audience
    or the account is not given: without them everybody's push subscription would be believed.
    """

    def __init__(self, *, audience: str, service_account: str, keys_url: str = GOOGLE_KEYS) -> None:
        if not audience or not service_account:
            raise ValueError("push needs the audience and the service account that its tokens name")
        self._audience = audience
        self._service_account = service_account
        self._keys = Jwks(keys_url)

    async def verify(self, token: str) -> None:
        """Raises Unauthenticated: bad shape, algorithm, signature, audience, issuer or time; Forbidden: another's
        account; Unavailable when Google's keys cannot be fetched."""
        if len(token) > MAX_TOKEN_BYTES:
            raise Unauthenticated(f"the token is longer than {MAX_TOKEN_BYTES} bytes")
        try:
            claims = await self._claims(token)
        except jwt.PyJWTError as error:
            raise Unauthenticated(f"the token does not verify: {error}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise Unauthenticated("the token is malformed") from error
        if claims.get("email") != self._service_account or claims.get("email_verified") is not True:
            raise Forbidden("the token is not of the service account that pushes here")

    async def _claims(self, token: str) -> dict[str, Any]:
        key_id = jwt.get_unverified_header(token).get("kid")
        if not isinstance(key_id, str):
            raise Unauthenticated("the token names no key")
        key = await self._keys.key(key_id)
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=[key.algorithm_name],
            audience=self._audience,
            issuer=GOOGLE_ISSUER,
            leeway=LEEWAY_SECONDS,
            options={"require": REQUIRED},
        )
        return claims
