"""Who pushes: the OIDC token that Pub/Sub puts on its push requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jwt
from jwt.types import Options

from producers.jwks import Jwks
from schemas.errors import Forbidden, Unauthenticated
from schemas.limits import MAX_TOKEN_BYTES
from schemas.ports import Clock

GOOGLE_ISSUER = "https://accounts.google.com"
GOOGLE_KEYS = "https://www.googleapis.com/oauth2/v3/certs"
LEEWAY_SECONDS = 10
OPTIONS: Options = {
    "require": ["exp", "iat", "aud", "iss", "sub"],
    "verify_exp": False,  # the library would ask this machine's clock: see `_check_times`
    "verify_iat": False,
    "verify_nbf": False,
}


class PushIdentity:
    """Accepts tokens that Google issued to one service account for one audience, and nothing else.

    Source: "Authentication for push subscriptions" in Pub/Sub's documentation. Raises ValueError where the audience
    or the account is not given: without them everybody's push subscription would be believed.
    """

    def __init__(self, clock: Clock, *, audience: str, service_account: str, keys_url: str = GOOGLE_KEYS) -> None:
        if not audience or not service_account:
            raise ValueError("push needs the audience and the service account that its tokens name")
        self._clock = clock
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
        self._check_times(claims)
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
            options=OPTIONS,
        )
        return claims

    def _check_times(self, claims: Mapping[str, Any]) -> None:
        """Raises Unauthenticated for a token of another time than now."""
        now = self._clock.now().timestamp()
        try:
            begins, ends = max(float(claims["iat"]), float(claims.get("nbf", 0))), float(claims["exp"])
        except (ValueError, TypeError, OverflowError) as error:
            raise Unauthenticated("the token's times are no numbers") from error
        if not begins - LEEWAY_SECONDS <= now < ends + LEEWAY_SECONDS:
            raise Unauthenticated("the token is not of this time")
