"""Tokens with which a browser listens to Firestore by itself."""

from __future__ import annotations

from starlette.responses import Response

from producers.intake import Call, reply
from producers.problems import NotOffered
from schemas.http import FirestoreTokenResponse


async def firestore_token(call: Call) -> Response:
    """A custom token for the caller. Raises NotOffered where there is no Firestore."""
    minter = call.services.minter
    if minter is None:
        raise NotOffered("there is no Firestore here to listen to; use terminal-stream-output")
    return reply(FirestoreTokenResponse(token=await minter.mint(call.principal)))
