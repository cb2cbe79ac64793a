"""What every function does around its own work: CORS, method, caller, rollout, and errors as problem documents."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from producers import cors
from producers.intake import Call, bearer_token
from producers.problems import MethodNotAllowed, problem_response
from producers.services import Services
from schemas.functions import Function

Work = Callable[[Call], Awaitable[Response]]


async def answer(services: Services, function: Function, work: Work, request: Request) -> Response:
    """Do a function's work for a caller who may ask for it; never raises but for cancellation."""
    try:
        response = await _answer(services, function, work, request)
    except ClientDisconnect:
        response = Response(status_code=400)  # nobody is there to read it
    except Exception as error:
        response = problem_response(error)
        if isinstance(error, MethodNotAllowed):
            response.headers["Allow"] = f"{function.method}, OPTIONS"
    cors.add_headers(response, request, services.allowed_origins)
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


async def _answer(services: Services, function: Function, work: Work, request: Request) -> Response:
    cors.check_origin(request, services.allowed_origins)
    if request.method == "OPTIONS":
        return cors.preflight(function.method)
    if request.method != function.method:
        raise MethodNotAllowed(f"{function.name} answers {function.method}")
    principal = await services.identity.verify(bearer_token(request))
    await services.rollout.check(services.store, services.clock, principal)
    return await work(Call(request, services, principal))
