"""Firebase custom tokens: with one, a browser signs in to Firestore as the user it already is."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import google.auth
import google.auth.transport.requests
from google.auth import crypt, iam, jwt
from google.auth.exceptions import GoogleAuthError

from schemas.errors import Rejected, Unavailable
from schemas.ports import Clock, Principal

AUDIENCE = "https://identitytoolkit.googleapis.com/google.identity.identitytoolkit.v1.IdentityToolkit"
SCOPES = ("https://www.googleapis.com/auth/iam",)
LIFE_SECONDS = 300  # it is exchanged at once; Firebase allows 3,600
MAX_UID_CHARACTERS = 128  # Firebase
SIGN_SECONDS = 10.0
EMULATOR_ACCOUNT = "emulator@local.invalid"


class FirebaseMinter:
    """Implements schemas.ports.Minter. `account` is the e-mail address of the service account that signs; without a
    `signer` tokens are unsigned, which only emulators accept."""

    def __init__(self, clock: Clock, *, account: str, signer: crypt.Signer | None) -> None:
        self._clock = clock
        self._account = account
        self._signer = signer

    async def mint(self, principal: Principal) -> str:
        """See Minter.mint. Raises Rejected for a user id that Firebase cannot take, Unavailable where the signing
        service does not answer."""
        payload = self._payload(principal)
        if self._signer is None:
            return unsigned(payload)
        try:
            async with asyncio.timeout(SIGN_SECONDS):
                signed = await asyncio.to_thread(jwt.encode, self._signer, payload)
        except (GoogleAuthError, TimeoutError) as error:
            raise Unavailable(f"a token could not be signed: {error}") from error
        return bytes(signed).decode()

    def _payload(self, principal: Principal) -> dict[str, Any]:
        if not 0 < len(principal.user) <= MAX_UID_CHARACTERS:
            raise Rejected(f"a user id of {len(principal.user)} characters cannot sign in to Firebase")
        now = int(self._clock.now().timestamp())
        claims = {"claims": {"admin": True}} if principal.admin else {}
        who = {"iss": self._account, "sub": self._account, "aud": AUDIENCE, "uid": principal.user}
        return {**who, "iat": now, "exp": now + LIFE_SECONDS, **claims}


def emulator_minter(clock: Clock) -> FirebaseMinter:
    """For emulators, which check no signature."""
    return FirebaseMinter(clock, account=EMULATOR_ACCOUNT, signer=None)


def iam_minter(clock: Clock, *, account: str) -> FirebaseMinter:
    """Signs with IAM's signBlob as `account`, which the environment's own account may be a token creator of: there is
    no key file anywhere. Blocks while it looks for credentials; raises DefaultCredentialsError without any."""
    credentials, _ = google.auth.default(scopes=SCOPES)
    return FirebaseMinter(clock, account=account, signer=iam_signer(credentials, account))


def iam_signer(credentials: Any, account: str) -> iam.Signer:
    """A signer that asks IAM each time, with these credentials."""
    return iam.Signer(google.auth.transport.requests.Request(), credentials, account)  # type: ignore[no-untyped-call]


def unsigned(payload: dict[str, Any]) -> str:
    """A token of algorithm "none": the last part, the signature, is empty."""
    parts = ({"alg": "none", "typ": "JWT"}, payload)
    return "".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() + "." for part in parts)
