"""The gateway's door: what may come in from a browser or a program on this machine, and as whom.

The loopback is no fence by itself. Any web page can make its browser send requests there, under the page's own name
(cross-site) or under a name that was pointed at 127.0.0.1 (DNS rebinding). So the Host must be ours, what a browser
says of a request's origin must be ours too, and the page's cookie counts for the page's own requests only.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from schemas.http import problem

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
FUNCTIONS_PREFIX = "/terminal-"
OWN_SITES = frozenset({None, "same-origin", "none"})  # Sec-Fetch-Site; None: not a browser, or an old one

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",  # the terminal writes its theme and cell sizes into style elements
        "img-src 'self'",
        "font-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
SECURITY_HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)

SECURITY_NAMES = frozenset(name for name, _ in SECURITY_HEADERS)

REFUSALS = {
    "bad_host": (421, "Unknown host"),
    "bad_origin": (403, "Unknown origin"),
}
"""Codes that only this gateway has, besides those of `schemas.http`."""


def problem_response(code: str, detail: str, retry_after: int | None = None) -> Response:
    """A problem document (RFC 9457) with our stable `code`; `retry_after` is in seconds."""
    document = problem(code, detail, retry_after=retry_after)
    if code in REFUSALS:
        status, title = REFUSALS[code]
        document = document.model_copy(update={"status": status, "title": title})
    return Response(
        document.model_dump_json(by_alias=True, exclude_none=True),
        document.status,
        None if retry_after is None else {"retry-after": str(retry_after)},
        "application/problem+json",
    )


class Guard:
    """ASGI middleware around everything the gateway serves.

    Refuses foreign hosts (421 bad_host), foreign origins (403 bad_origin) and, while the stack closes, anything
    that changes something (503 unavailable). Gives the page's requests the token in its cookie as their
    Authorization, and every response the security headers.
    """

    def __init__(self, app: ASGIApp, *, port: int, allowed_origins: Iterable[str] = ()) -> None:
        self._app = app
        self._hosts = own_hosts(port)
        self._allowed_origins = frozenset(allowed_origins)
        self._cookie = cookie_name(port)
        self.closing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": _with_security(message.get("headers", ()))}
            await send(message)

        if scope["type"] != "http":  # the server starts no other kind: no websockets, no lifespan
            raise NotImplementedError(scope["type"])
        headers = Headers(scope=scope)
        refusal = self._refusal(scope["method"], headers)
        if refusal is not None:
            await refusal(scope, receive, send_guarded)
        else:
            await self._app(self._as_own(scope, headers) if self._is_own(headers) else scope, receive, send_guarded)

    def _refusal(self, method: str, headers: Headers) -> Response | None:
        host = headers.getlist("host")
        if len(host) != 1 or host[0] not in self._hosts:
            return problem_response("bad_host", f"this server is {self._hosts[0]}, and answers under no other name")
        changes = method not in SAFE_METHODS
        if not self._is_own(headers) and not self._is_allowed(headers):
            by_cookie = "authorization" not in headers and self._token(headers) is not None
            if changes or (by_cookie and "origin" in headers):
                return problem_response("bad_origin", "requests from other sites' pages are refused")
        if changes and self.closing:
            return problem_response("unavailable", "the stack is closing", retry_after=10)
        return None

    def _is_own(self, headers: Headers) -> bool:
        """Whether the request comes from our own page or from no page at all."""
        if headers.get("sec-fetch-site") not in OWN_SITES:
            return False
        origin = headers.get("origin")
        return origin is None or origin == f"http://{headers['host']}"

    def _is_allowed(self, headers: Headers) -> bool:
        """Whether it comes from a page of another origin that the settings allow; it must bring its own token."""
        return headers.get("origin") in self._allowed_origins

    def _as_own(self, scope: Scope, headers: Headers) -> Scope:
        """The same request for the functions: no cross-origin one, and with the cookie's token if it has none."""
        passed = [(name, value) for name, value in scope["headers"] if name != b"origin"]
        token = self._token(headers)
        if token is not None and "authorization" not in headers and scope["path"].startswith(FUNCTIONS_PREFIX):
            passed.append((b"authorization", b"Bearer " + token.encode("latin-1")))
        return {**scope, "headers": passed}

    def _token(self, headers: Headers) -> str | None:
        return read_cookie(headers, self._cookie)


def _with_security(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """These headers and ours; ours win."""
    return [header for header in headers if header[0] not in SECURITY_NAMES] + list(SECURITY_HEADERS)


def own_hosts(port: int) -> tuple[str, ...]:
    """The values of Host under which the gateway answers; the first is the one it prints."""
    names = ("127.0.0.1", "localhost")
    return tuple(f"{name}:{port}" for name in names) + (names if port == 80 else ())


def cookie_name(port: int) -> str:
    """The page's cookie. Browsers share cookies between the ports of a host, so its name says whose it is."""
    return f"pigeon_{port}"


def read_cookie(headers: Headers, name: str) -> str | None:
    """The value of a cookie, or None."""
    return cookie_parser("; ".join(headers.getlist("cookie"))).get(name)
