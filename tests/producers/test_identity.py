"""Who gets in."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from producers.identity import LocalIdentity, PublishedKeys, SupabaseIdentity, TokenIdentity, sign_local_token
from producers.jwks import COOLDOWN_SECONDS, MAX_AGE_SECONDS, MAX_STALE_SECONDS, RETRY_SECONDS, Jwks
from schemas.errors import PigeonError, Unauthenticated, Unavailable
from schemas.limits import MAX_TOKEN_BYTES
from schemas.ports import Principal
from tests.producers.world import served

ISSUER = "https://project.supabase.example/auth/v1"
AUDIENCE = "authenticated"
SECRET = "a legacy secret of the project, long enough"
LOCAL_SECRET = b"a secret of this machine, 32 bytes or more"


def claims(**changes: Any) -> dict[str, Any]:
    now = datetime.now(UTC)
    base = {"sub": "alice", "iss": ISSUER, "aud": AUDIENCE, "iat": now, "exp": now + timedelta(minutes=5)}
    return {name: value for name, value in {**base, **changes}.items() if value is not None}


def signed(key: Any = SECRET, algorithm: str = "HS256", headers: dict[str, Any] | None = None, **changes: Any) -> str:
    return jwt.encode(claims(**changes), key, algorithm=algorithm, headers=headers)


def unsigned(header: dict[str, Any], **changes: Any) -> str:
    return forged(header, lambda _: b"", **changes)


def forged(header: dict[str, Any], sign: Callable[[bytes], bytes], **changes: Any) -> str:
    """A token that no honest library writes."""
    now = int(datetime.now(UTC).timestamp())
    payload = {**claims(**changes), "iat": now, "exp": now + 300}
    content = b".".join(unpadded(json.dumps(part).encode()) for part in (header, payload))
    return (content + b"." + unpadded(sign(content))).decode()


def unpadded(content: bytes) -> bytes:
    return base64.urlsafe_b64encode(content).rstrip(b"=")


@pytest.fixture
def identity() -> SupabaseIdentity:
    """A project that still signs with its legacy secret."""
    return SupabaseIdentity(issuer=ISSUER, audience=AUDIENCE, secret=SECRET)


async def test_a_valid_token_says_who_calls(identity: SupabaseIdentity) -> None:
    """The subject is the user."""
    assert await identity.verify(signed()) == Principal("alice")


async def test_only_what_administrators_write_makes_an_administrator(identity: SupabaseIdentity) -> None:
    """Users write their own user_metadata, and `role` is a database role."""
    assert (await identity.verify(signed(app_metadata={"role": "admin"}))).admin
    for ours in ({"user_metadata": {"role": "admin"}}, {"role": "admin"}, {"app_metadata": "admin"}):
        assert not (await identity.verify(signed(**ours))).admin


PAST = datetime.now(UTC) - timedelta(hours=1)
FUTURE = datetime.now(UTC) + timedelta(hours=1)


@pytest.mark.parametrize(
    "token",
    [
        pytest.param("", id="empty"),
        pytest.param("x", id="no token"),
        pytest.param("a.b.c", id="no base64"),
        pytest.param("\ud800.b.c", id="no text"),
        pytest.param(signed(exp=PAST), id="expired"),
        pytest.param(signed(exp=None), id="without expiry"),
        pytest.param(signed(exp="soon"), id="expiry is no time"),
        pytest.param(signed(nbf=FUTURE), id="not yet valid"),
        pytest.param(signed(iat=FUTURE), id="issued in the future"),
        pytest.param(signed(aud="other"), id="other audience"),
        pytest.param(signed(aud=None), id="without audience"),
        pytest.param(signed(iss="https://evil.example"), id="other issuer"),
        pytest.param(signed(iss=None), id="without issuer"),
        pytest.param(signed(sub=None), id="without subject"),
        pytest.param(signed(sub=""), id="empty subject"),
        pytest.param(signed(sub="x" * 200), id="huge subject"),
        pytest.param(signed(key="another secret that is also long enough"), id="wrong key"),
        pytest.param(signed(algorithm="HS512", key=SECRET * 2), id="another algorithm"),
        pytest.param(unsigned({"alg": "none", "typ": "JWT"}), id="alg none"),
        pytest.param(unsigned({"alg": "None"}), id="alg None"),
        pytest.param(unsigned({"alg": "HS256"}), id="unsigned"),
        pytest.param(unsigned({"alg": ["HS256"]}), id="alg is a list"),
        pytest.param(unsigned({"alg": "HS256", "crit": ["b64"], "b64": False}), id="detached"),
        pytest.param(signed()[:-4] + "AAAA", id="tampered signature"),
        pytest.param("[" * 4000 + ".e30.x", id="nested header"),
        pytest.param(signed(padding="x" * MAX_TOKEN_BYTES), id="huge"),
    ],
)
async def test_what_does_not_verify_is_refused(identity: SupabaseIdentity, token: str) -> None:
    """Whatever is wrong with a token, it is Unauthenticated and nothing else."""
    with pytest.raises(Unauthenticated):
        await identity.verify(token)


@given(st.text(max_size=60) | st.lists(st.binary(max_size=30), min_size=3, max_size=3))
async def test_no_token_makes_the_door_fall_over(given_token: str | list[bytes]) -> None:
    """Garbage is refused, never an internal error."""
    identity = SupabaseIdentity(issuer=ISSUER, secret=SECRET)
    token = given_token if isinstance(given_token, str) else b".".join(unpadded(part) for part in given_token).decode()
    with pytest.raises(Unauthenticated):
        await identity.verify(token)


async def test_a_clock_that_is_a_little_off_locks_nobody_out(identity: SupabaseIdentity) -> None:
    """Five seconds are forgiven, a minute is not."""
    now = datetime.now(UTC)
    assert await identity.verify(signed(exp=now - timedelta(seconds=3)))
    with pytest.raises(Unauthenticated):
        await identity.verify(signed(exp=now - timedelta(minutes=1)))


def test_a_weak_or_ambiguous_set_up_is_refused() -> None:
    """At start, rather than at the first attack."""
    with pytest.raises(ValueError, match="at least 32 bytes"):
        SupabaseIdentity(issuer=ISSUER, secret="short")
    for both in ({}, {"secret": SECRET, "jwks_url": "https://x.example"}):
        with pytest.raises(ValueError, match="exactly one"):
            SupabaseIdentity(issuer=ISSUER, **both)


async def test_local_tokens_are_good_here_and_nowhere_else(identity: SupabaseIdentity) -> None:
    """The embedded stack signs its own; neither kind of token passes for the other."""
    local = LocalIdentity(LOCAL_SECRET)
    token = sign_local_token(LOCAL_SECRET, "alice", timedelta(minutes=1))
    assert await local.verify(token) == Principal("alice")
    assert (await local.verify(sign_local_token(LOCAL_SECRET, "a", timedelta(minutes=1), admin=True))).admin
    for wrong in (
        sign_local_token(LOCAL_SECRET, "alice", timedelta(minutes=-1)),
        sign_local_token(LOCAL_SECRET[::-1], "alice", timedelta(minutes=1)),
        signed(key=LOCAL_SECRET),
    ):
        with pytest.raises(Unauthenticated):
            await local.verify(wrong)
    with pytest.raises(Unauthenticated):
        await SupabaseIdentity(issuer=ISSUER, secret=LOCAL_SECRET.decode()).verify(token)


class Provider:
    """An identity provider: a key set behind a real server, and a clock for its readers."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.fetches = 0
        self.url = ""
        self.answer: Response | None = None
        self.private: dict[str, Any] = {}
        self.published: list[dict[str, Any]] = []

    def add(self, key_id: str, key: Any, algorithm: str, **fields: Any) -> None:
        """Start to use a key."""
        public = json.loads(jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key()))
        self.published.append({**public, "kid": key_id, "use": "sig", "alg": algorithm, **fields})
        self.private[key_id] = (key, algorithm)

    def sign(self, key_id: str, **changes: Any) -> str:
        """A token signed with that key."""
        key, algorithm = self.private[key_id]
        return signed(key, algorithm, headers={"kid": key_id}, **changes)

    async def serve(self, _: Request) -> Response:
        """The key set's address."""
        self.fetches += 1
        return self.answer or JSONResponse({"keys": self.published})


@pytest.fixture
async def provider(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Provider]:
    """A provider with one key, at `provider.url`."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    provider = Provider()
    provider.add("first", ec.generate_private_key(ec.SECP256R1()), "ES256")
    async with served(Starlette(routes=[Route("/jwks.json", provider.serve)])) as address:
        provider.url = f"{address}/jwks.json"
        yield provider


@pytest.fixture
def by_key_set(provider: Provider) -> TokenIdentity:
    """Verifies by the provider's key set, in the provider's time."""
    jwks = Jwks(provider.url, monotonic=lambda: provider.now)
    return TokenIdentity(PublishedKeys(jwks), issuer=ISSUER, audience=AUDIENCE)


async def test_every_kind_of_published_key_verifies(provider: Provider, by_key_set: TokenIdentity) -> None:
    """Elliptic curve, RSA and Edwards curve keys, side by side, fetched once."""
    provider.add("rsa", rsa.generate_private_key(65537, 2048), "RS256")
    provider.add("edwards", ed25519.Ed25519PrivateKey.generate(), "EdDSA")
    for key_id in provider.private:
        assert await by_key_set.verify(provider.sign(key_id)) == Principal("alice")
    assert provider.fetches == 1


async def test_a_rotated_key_is_found_and_a_withdrawn_one_refused(
    provider: Provider, by_key_set: TokenIdentity
) -> None:
    """Rotation needs no restart."""
    old = provider.sign("first")
    await by_key_set.verify(old)
    provider.published.clear()
    provider.add("second", ec.generate_private_key(ec.SECP256R1()), "ES256")
    with pytest.raises(Unauthenticated):
        await by_key_set.verify(provider.sign("second"))
    provider.now += COOLDOWN_SECONDS
    assert await by_key_set.verify(provider.sign("second"))
    with pytest.raises(Unauthenticated):
        await by_key_set.verify(old)


async def test_a_withdrawn_key_is_forgotten_in_time(provider: Provider, by_key_set: TokenIdentity) -> None:
    """Also if nobody asks for a new one."""
    token = provider.sign("first")
    await by_key_set.verify(token)
    provider.published.clear()
    provider.now += MAX_AGE_SECONDS + 1
    with pytest.raises(Unauthenticated):
        await by_key_set.verify(token)


async def test_made_up_key_ids_do_not_flood_the_provider(provider: Provider, by_key_set: TokenIdentity) -> None:
    """Anybody can send them, unauthenticated."""
    key, _ = provider.private["first"]
    for number in range(20):
        with pytest.raises(Unauthenticated):
            await by_key_set.verify(signed(key, "ES256", headers={"kid": f"made-up-{number}"}))
    assert provider.fetches == 1


async def test_a_token_for_another_key_does_not_verify(provider: Provider, by_key_set: TokenIdentity) -> None:
    """Naming a key is not having it; and a public key is no HMAC secret, whatever the token's algorithm says."""
    other = ec.generate_private_key(ec.SECP256R1())
    public = json.dumps(provider.published[0]).encode()
    for token in (
        signed(other, "ES256", headers={"kid": "first"}),
        forged({"alg": "HS256", "kid": "first"}, lambda content: hmac.digest(public, content, "sha256")),
        signed(other, "ES256"),
        unsigned({"alg": "none", "kid": "first"}),
        unsigned({"alg": "ES256", "kid": ["first"]}),
    ):
        with pytest.raises(Unauthenticated):
            await by_key_set.verify(token)


async def test_only_public_signing_keys_are_taken(provider: Provider, by_key_set: TokenIdentity) -> None:
    """A symmetric or broken key in the set neither verifies anything nor spoils the others."""
    secret = base64.urlsafe_b64encode(SECRET.encode()).decode()
    provider.published += [
        {"kty": "oct", "kid": "symmetric", "k": secret, "alg": "HS256"},
        {"kty": "EC", "kid": "broken", "crv": "P-256", "x": "AA", "y": "AA"},
        {"kty": "alien", "kid": "alien"},
    ]
    provider.add("encryption", ec.generate_private_key(ec.SECP256R1()), "ES256", use="enc")
    for token in (signed(headers={"kid": "symmetric"}), provider.sign("encryption")):
        with pytest.raises(Unauthenticated):
            await by_key_set.verify(token)
    assert await by_key_set.verify(provider.sign("first"))


BROKEN = [
    Response(status_code=500),
    Response(b"<html>"),
    JSONResponse([]),
    JSONResponse({"keys": {}}),
    RedirectResponse("https://evil.example/jwks.json"),
]


@pytest.mark.parametrize("broken", BROKEN, ids=["500", "html", "list", "no list", "redirect"])
async def test_a_provider_that_is_away_is_no_ones_fault(
    provider: Provider, by_key_set: TokenIdentity, broken: Response
) -> None:
    """Without keys the answer is 503 and not 401; known keys are good for an hour; it is asked again soon."""
    provider.answer = broken
    with pytest.raises(Unavailable):
        await by_key_set.verify(provider.sign("first"))
    provider.answer = None
    provider.now += RETRY_SECONDS
    assert await by_key_set.verify(provider.sign("first"))
    provider.answer = broken
    provider.now += MAX_STALE_SECONDS - 1
    assert await by_key_set.verify(provider.sign("first"))
    provider.now += 2
    with pytest.raises(Unavailable):
        await by_key_set.verify(provider.sign("first"))


async def test_an_unreachable_provider_is_unavailable() -> None:
    """A refused connection, told without its address."""
    identity = SupabaseIdentity(issuer=ISSUER, jwks_url="http://127.0.0.1:9/jwks.json")
    key = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(PigeonError) as raised:
        await identity.verify(signed(key, "ES256", headers={"kid": "first"}))
    assert isinstance(raised.value, Unavailable)
