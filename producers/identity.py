"""Who is calling: access tokens (JWT, RFC 7519), with the algorithms pinned by the deployment, never by the token."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import jwt

from producers.jwks import Jwks
from schemas.errors import Unauthenticated
from schemas.limits import MAX_TOKEN_BYTES
from schemas.ports import Identity, Principal

LEEWAY_SECONDS = 10
MAX_USER_BYTES = 128  # a user's id becomes part of document ids
MIN_SECRET_BYTES = 32  # RFC 7518 section 3.2
LOCAL_ISSUER = "pigeon"
LOCAL_AUDIENCE = "pigeon"
REQUIRED = ["exp", "sub", "aud", "iss"]


class Keys(Protocol):
    """Where a token's key comes from."""

    async def key_for(self, header: Mapping[str, Any]) -> tuple[Any, list[str]]:
        """The key for a token with this (unverified) header, and the algorithms it may be used with.

        Raises Unauthenticated or Unavailable.
        """


class SharedSecret:
    """One HMAC secret, for HS256 only. Raises ValueError if it is too short to be one."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) < MIN_SECRET_BYTES:
            raise ValueError(f"a token secret has at least {MIN_SECRET_BYTES} bytes, this one {len(secret)}")
        self._secret = secret

    async def key_for(self, header: Mapping[str, Any]) -> tuple[bytes, list[str]]:
        """The secret, whatever the header says."""
        return self._secret, ["HS256"]


class PublishedKeys:
    """The provider's public keys, each with its own algorithm only."""

    def __init__(self, jwks: Jwks) -> None:
        self._jwks = jwks

    async def key_for(self, header: Mapping[str, Any]) -> tuple[jwt.PyJWK, list[str]]:
        """The key that the header's `kid` names."""
        key_id = header.get("kid")
        if not isinstance(key_id, str):
            raise Unauthenticated("the token names no key")
        key = await self._jwks.key(key_id)
        return key, [key.algorithm_name]


class TokenIdentity:
    """Verifies tokens of one issuer for one audience."""

    def __init__(self, keys: Keys, *, issuer: str, audience: str) -> None:
        self._keys = keys
        self._issuer = issuer
        self._audience = audience

    async def verify(self, token: str) -> Principal:
        """Raises Unauthenticated: bad shape, algorithm, signature, audience, issuer or time. Raises Unavailable
        when the keys cannot be fetched."""
        if len(token) > MAX_TOKEN_BYTES:
            raise Unauthenticated(f"the token is longer than {MAX_TOKEN_BYTES} bytes")
        try:
            return _principal(await self._claims(token))
        except jwt.PyJWTError as error:
            raise Unauthenticated(f"the token does not verify: {error}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise Unauthenticated("the token is malformed") from error

    async def _claims(self, token: str) -> dict[str, Any]:
        key, algorithms = await self._keys.key_for(jwt.get_unverified_header(token))
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=algorithms,
            audience=self._audience,
            issuer=self._issuer,
            leeway=LEEWAY_SECONDS,
            options={"require": REQUIRED},
        )
        return claims


class SupabaseIdentity(TokenIdentity):
    """Access tokens of a Supabase project: by its key set (`jwks_url`) or by its legacy HS256 `secret`, exactly one.

    `issuer` is "https://PROJECT.supabase.co/auth/v1". Raises ValueError for neither or both, or a short secret.
    """

    def __init__(self, *, issuer: str, audience: str = "authenticated", jwks_url: str = "", secret: str = "") -> None:
        if bool(jwks_url) == bool(secret):
            raise ValueError("exactly one of a key set's address and a secret is needed")
        keys: Keys = PublishedKeys(Jwks(jwks_url)) if jwks_url else SharedSecret(secret.encode())
        super().__init__(keys, issuer=issuer, audience=audience)


class LocalIdentity(TokenIdentity):
    """Tokens that this installation signed itself, with `sign_local_token`."""

    def __init__(self, secret: bytes) -> None:
        super().__init__(SharedSecret(secret), issuer=LOCAL_ISSUER, audience=LOCAL_AUDIENCE)


class AnyOf:
    """Accepts what any of these accepts, asked in this order: the site's users beside this machine's own."""

    def __init__(self, *identities: Identity) -> None:
        self._identities = identities

    async def verify(self, token: str) -> Principal:
        """See Identity.verify. What the last of them says of the token is what its bearer is told."""
        *others, last = self._identities
        for identity in others:
            try:
                return await identity.verify(token)
            except Unauthenticated:
                continue
        return await last.verify(token)


def sign_local_token(secret: bytes, user: str, ttl: timedelta, *, admin: bool = False) -> str:
    """A token for `user` that LocalIdentity accepts for as long as `ttl`."""
    now = datetime.now(UTC)
    claims: dict[str, Any] = {
        "sub": user,
        "iss": LOCAL_ISSUER,
        "aud": LOCAL_AUDIENCE,
        "iat": now,
        "exp": now + ttl,
    }
    if admin:
        claims["app_metadata"] = {"role": "admin"}
    return jwt.encode(claims, secret, algorithm="HS256")


def _principal(claims: Mapping[str, Any]) -> Principal:
    """`app_metadata` is written by the provider's administrators; `user_metadata` by users, and never read."""
    user = claims["sub"]
    if not user or len(user.encode()) > MAX_USER_BYTES:
        raise Unauthenticated(f"the token's subject must have 1 to {MAX_USER_BYTES} bytes")
    metadata = claims.get("app_metadata")
    return Principal(user, admin=isinstance(metadata, dict) and metadata.get("role") == "admin")
