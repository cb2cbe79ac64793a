"""Custom tokens are what Firebase takes, signed without a key in our hands."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from google.auth import iam
from google.auth import transport as auth_transport
from google.auth.credentials import AnonymousCredentials

from infra.adapters.firebase_token import AUDIENCE, FirebaseMinter, emulator_minter
from schemas.errors import Rejected, Unavailable
from schemas.ports import Principal

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
ACCOUNT = "functions@project.iam.gserviceaccount.com"


class Noon:
    """A clock that stands."""

    def now(self) -> datetime:
        """Always the same."""
        return NOW

    async def sleep(self, seconds: float) -> None:
        """At once."""


class Answer(auth_transport.Response):
    """What IAM answered."""

    def __init__(self, status: int, body: bytes) -> None:
        self._status, self._body = status, body

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self._status

    @property
    def headers(self) -> Mapping[str, str]:
        """None that matter."""
        return {}

    @property
    def data(self) -> bytes:
        """The body."""
        return self._body


class SigningService(auth_transport.Request):
    """IAM's signBlob, with a key of its own."""

    def __init__(self, status: int = 200) -> None:
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.status = status
        self.urls: list[str] = []

    def __call__(
        self, url: Any, method: Any = "GET", body: Any = None, headers: Any = None, timeout: Any = None, **_: Any
    ) -> Answer:
        """Sign what is asked for."""
        self.urls.append(url)
        blob = base64.b64decode(json.loads(body)["payload"])
        signed = base64.b64encode(self.key.sign(blob, padding.PKCS1v15(), hashes.SHA256())).decode()
        return Answer(self.status, json.dumps({"keyId": "1", "signedBlob": signed}).encode())

    def public_key(self) -> bytes:
        """In PEM."""
        spki = serialization.PublicFormat.SubjectPublicKeyInfo
        return self.key.public_key().public_bytes(serialization.Encoding.PEM, spki)


def minter(service: SigningService) -> FirebaseMinter:
    """Signs through IAM."""
    nobody = AnonymousCredentials()  # type: ignore[no-untyped-call]
    signer = iam.Signer(service, nobody, ACCOUNT)  # type: ignore[no-untyped-call]
    return FirebaseMinter(Noon(), account=ACCOUNT, signer=signer)


async def test_a_token_is_signed_by_iam() -> None:
    """RS256 over the user's own id, for Firebase only, for five minutes."""
    service = SigningService()
    token = await minter(service).mint(Principal("alice"))
    claims = jwt.decode(
        token,
        service.public_key(),
        algorithms=["RS256"],
        audience=AUDIENCE,
        options={"verify_exp": False, "verify_iat": False},
    )
    issued = int(NOW.timestamp())
    assert claims == {
        "iss": ACCOUNT,
        "sub": ACCOUNT,
        "aud": AUDIENCE,
        "uid": "alice",
        "iat": issued,
        "exp": issued + 300,
    }
    assert service.urls[0].endswith(f"/{ACCOUNT}:signBlob")


async def test_an_admin_is_one_by_claim() -> None:
    """The rules look at this claim."""
    claims = _claims(await emulator_minter(Noon()).mint(Principal("root", admin=True)))
    assert claims["claims"] == {"admin": True}
    assert "claims" not in _claims(await emulator_minter(Noon()).mint(Principal("alice")))


async def test_the_emulators_token_is_unsigned() -> None:
    """Algorithm none and an empty signature."""
    token = await emulator_minter(Noon()).mint(Principal("alice"))
    assert jwt.get_unverified_header(token)["alg"] == "none"
    assert token.endswith(".")
    assert _claims(token)["uid"] == "alice"


async def test_a_refusal_to_sign_is_unavailable() -> None:
    """No foreign error leaves the adapter."""
    with pytest.raises(Unavailable):
        await minter(SigningService(status=403)).mint(Principal("alice"))


@pytest.mark.parametrize("user", ["", "x" * 129])
async def test_a_user_id_that_firebase_cannot_take_is_refused(user: str) -> None:
    """Its limit is 128 characters."""
    with pytest.raises(Rejected):
        await emulator_minter(Noon()).mint(Principal(user))


def _claims(token: str) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims
