"""Cross-origin requests: an allow-list, never a wildcard, and no credentials besides the bearer token."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from schemas.errors import Forbidden

ALLOWED_HEADERS = "Authorization, Content-Type, Idempotency-Key, Last-Event-ID, Traceparent"
EXPOSED_HEADERS = "Retry-After, WWW-Authenticate, Content-Disposition"
PREFLIGHT_MAX_AGE_SECONDS = 7200  # what browsers cap it at


def check_origin(request: Request, allowed: frozenset[str]) -> None:
    """Raises Forbidden for a web page of an origin that is not on the list; callers without an origin are no pages."""
    origin = request.headers.get("origin")
    if origin is not None and origin not in allowed:
        raise Forbidden("this origin is not on the allow-list")


def preflight(method: str) -> Response:
    """The answer to OPTIONS."""
    headers = {
        "Allow": f"{method}, OPTIONS",
        "Access-Control-Allow-Methods": method,
        "Access-Control-Allow-Headers": ALLOWED_HEADERS,
        "Access-Control-Max-Age": str(PREFLIGHT_MAX_AGE_SECONDS),
    }
    return Response(status_code=204, headers=headers)


def add_headers(response: Response, request: Request, allowed: frozenset[str]) -> None:
    """Let the calling page read the answer if its origin is on the list, and keep caches from mixing origins up."""
    response.headers["Vary"] = "Origin"
    origin = request.headers.get("origin")
    if origin is not None and origin in allowed:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS
