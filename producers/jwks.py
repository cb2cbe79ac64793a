"""Signing keys of an identity provider (JSON Web Key Set, RFC 7517): cached, and fetched again when they rotate."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import httpx
import jwt

from schemas.errors import Unauthenticated, Unavailable

logger = logging.getLogger(__name__)

MAX_AGE_SECONDS = 600.0  # a key that was withdrawn is trusted for at most so long, while the provider answers
MAX_STALE_SECONDS = 3600.0  # and for so long while it does not
COOLDOWN_SECONDS = 30.0  # between fetches that an unknown key id asks for: made-up ids must not become a flood
RETRY_SECONDS = 2.0  # after a fetch that failed
FETCH_TIMEOUT_SECONDS = 5.0
ALGORITHMS = frozenset({"ES256", "RS256", "EdDSA"})


class Jwks:
    """The keys at `url`. Fetching runs in a thread, one at a time."""

    def __init__(self, url: str, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._monotonic = monotonic
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_at = float("-inf")
        self._next_fetch_at = float("-inf")
        self._fetching = asyncio.Lock()

    async def key(self, key_id: str) -> jwt.PyJWK:
        """The key of that id. Raises Unauthenticated if there is none, Unavailable if the keys cannot be fetched."""
        if not self._fresh(key_id):
            async with self._fetching:
                if not self._fresh(key_id):
                    await self._refresh()
        if self._age() > MAX_STALE_SECONDS:
            raise Unavailable("the identity provider's keys cannot be fetched")
        if key_id not in self._keys:
            raise Unauthenticated("the token is signed with an unknown key")
        return self._keys[key_id]

    def _fresh(self, key_id: str) -> bool:
        if key_id in self._keys and self._age() <= MAX_AGE_SECONDS:
            return True
        return self._monotonic() < self._next_fetch_at

    def _age(self) -> float:
        return self._monotonic() - self._fetched_at

    async def _refresh(self) -> None:
        try:
            self._keys = await asyncio.to_thread(_fetch, self._url)
        except (httpx.HTTPError, ValueError, jwt.PyJWTError) as error:
            self._next_fetch_at = self._monotonic() + RETRY_SECONDS
            logger.warning("the identity provider's keys cannot be fetched: %s", error)
        else:
            self._fetched_at = self._monotonic()
            self._next_fetch_at = self._fetched_at + COOLDOWN_SECONDS


def _fetch(url: str) -> dict[str, jwt.PyJWK]:
    response = httpx.get(url, timeout=FETCH_TIMEOUT_SECONDS, follow_redirects=False)
    response.raise_for_status()
    document = json.loads(response.content)
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError("the key set has no list of keys")
    keys = (_key(entry) for entry in entries)
    return {str(key.key_id): key for key in keys if key is not None}


def _key(entry: Any) -> jwt.PyJWK | None:
    """A public signing key with an id; None for anything else, symmetric keys above all."""
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig" or not isinstance(entry.get("kid"), str):
        return None
    try:
        key = jwt.PyJWK(entry)
    except jwt.PyJWTError:
        return None  # one key of an unknown kind does not spoil the others
    return key if key.algorithm_name in ALGORITHMS else None
