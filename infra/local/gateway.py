"""One server for everything a person or a program on this machine talks to: the functions, the page, the way in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from infra.local.assets import load_assets
from infra.local.guard import Guard, cookie_name, own_hosts, problem_response, read_cookie
from infra.local.keys import Tickets
from producers.identity import LocalIdentity, sign_local_token
from schemas.errors import Unauthenticated
from schemas.functions import FUNCTIONS
from schemas.ports import Clock

Endpoint = Callable[[Request], Awaitable[Response]]

COOKIE_LIFETIME = timedelta(days=1)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")  # a function refuses those it has not itself


class Access:
    """How people get in: one-time addresses, the page's cookie, and tokens of this machine.

    `secret` signs and verifies those tokens.
    """

    def __init__(self, secret: bytes, clock: Clock, *, port: int) -> None:
        self.port = port
        self._secret = secret
        self._identity = LocalIdentity(secret)
        self._tickets = Tickets(clock)

    def address(self, user: str) -> str:
        """A fresh one-time address of the page."""
        return f"http://{own_hosts(self.port)[0]}/?ticket={self._tickets.issue(user)}"

    def redeem(self, ticket: str) -> str | None:
        """The value of the page's cookie, an access token, in exchange for a ticket; None if it is good no more."""
        user = self._tickets.redeem(ticket)
        return None if user is None else sign_local_token(self._secret, user, COOKIE_LIFETIME)

    async def user_of(self, token: str | None) -> str:
        """Whose token of this machine that is. Raises Unauthenticated."""
        return (await self._identity.verify(token or "")).user


def gateway(functions: Mapping[str, Endpoint], access: Access, *, allowed_origins: tuple[str, ...] = ()) -> Guard:
    """The ASGI application: every function at /terminal-..., the page at /, tickets and health, behind the guard."""
    routes = [*_function_routes(functions), *_page_routes(access)]
    routes.append(Route("/tickets", _issue(access), methods=["POST"]))
    routes.append(Route("/healthz", _health, methods=["GET"]))
    return Guard(Starlette(routes=routes), port=access.port, allowed_origins=allowed_origins)


def _function_routes(functions: Mapping[str, Endpoint]) -> list[Route]:
    return [
        Route(f"/{name}/{{session}}" if FUNCTIONS[name].by_session else f"/{name}", endpoint, methods=METHODS)
        for name, endpoint in functions.items()
    ]


def _page_routes(access: Access) -> list[Route]:
    assets = load_assets()
    page, door = assets.pop("/page/index.html"), assets.pop("/page/door.html")

    async def index(request: Request) -> Response:
        ticket = request.query_params.get("ticket")
        if ticket is not None and request.method == "GET":
            return _enter(access, request, ticket)
        if await _is_known(access, request):
            return page.answer(request)
        response = door.answer(request, 401)
        if request.headers.get("sec-fetch-site") == "cross-site":
            # Whoever follows a link from another site does not send a SameSite=Strict cookie, not even after our
            # redirect. Asked for again by this page, the request is our own and carries it.
            response.headers["refresh"] = "0; url=/"
        return response

    async def asset(request: Request) -> Response:
        found = assets.get(request.url.path)
        return found.answer(request) if found else problem_response("not_found", "there is no such file")

    return [
        Route("/", index, methods=["GET"]),
        Route("/page/{name:path}", asset, methods=["GET"]),
        Route("/vendor/{name:path}", asset, methods=["GET"]),
    ]


def _enter(access: Access, request: Request, ticket: str) -> Response:
    """Exchange a ticket for the cookie. A used or old one leads to the page that says how to get a new one."""
    response = RedirectResponse("/", 303, {"cache-control": "no-store"})
    token = access.redeem(ticket)
    if token is not None:
        response.set_cookie(
            cookie_name(access.port),
            token,
            max_age=int(COOKIE_LIFETIME.total_seconds()),
            httponly=True,
            samesite="strict",
        )
    return response


async def _is_known(access: Access, request: Request) -> bool:
    try:
        await access.user_of(read_cookie(request.headers, cookie_name(access.port)))
    except Unauthenticated:
        return False
    return True


def _issue(access: Access) -> Endpoint:
    async def issue(request: Request) -> Response:
        """A fresh address for whoever holds a token of this machine; the page's cookie will not do."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        try:
            user = await access.user_of(token if scheme.lower() == "bearer" else None)
        except Unauthenticated as error:
            return problem_response(error.code, str(error))
        return JSONResponse({"address": access.address(user)}, headers={"cache-control": "no-store"})

    return issue


async def _health(_: Request) -> Response:
    return JSONResponse({"status": "ok"})
