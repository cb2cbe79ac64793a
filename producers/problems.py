"""Refusals and failures as problem documents (RFC 9457)."""

from __future__ import annotations

import logging

from pydantic import ValidationError
from starlette.responses import Response

from schemas.errors import AgentRefused, LimitReached, Malformed, PigeonError, Rejected, Unavailable
from schemas.http import PROBLEMS, FieldProblem, Problem, problem

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 2


class MethodNotAllowed(Rejected):
    """The function answers another method."""

    code = "method_not_allowed"


class UnsupportedMediaType(Rejected):
    """The body is not application/json in UTF-8."""

    code = "unsupported_media_type"


class NotOffered(Rejected):
    """This deployment does not have what the function is for."""

    code = "not_offered"


class NotReady(Unavailable):
    """The session has no sandbox yet; the same call will succeed later."""

    code = "not_ready"


class TransferPending(Unavailable):
    """A transfer was not finished when the answer was due; asking again is safe."""

    code = "transfer_pending"


class InvalidFields(Malformed):
    """A body whose fields are not what the schema says; `errors` names each of them."""

    def __init__(self, error: ValidationError) -> None:
        self.errors = tuple(
            FieldProblem(field=".".join(str(part) for part in item["loc"]), message=item["msg"])
            for item in error.errors(include_url=False, include_input=False, include_context=False)
        )
        super().__init__("; ".join(f"{e.field}: {e.message}" if e.field else e.message for e in self.errors[:3]))


TOLD = (Rejected, AgentRefused, NotReady, TransferPending)
"""Errors whose message is meant for the caller; what other errors say may name hosts and paths, and is logged only."""


def problem_document(error: Exception) -> Problem:
    """What to tell about `error`. What must not be told is logged."""
    code = error.code if isinstance(error, PigeonError) else "internal"
    if code not in PROBLEMS and not isinstance(error, AgentRefused):
        code = "internal"
    told = isinstance(error, TOLD)
    if isinstance(error, Unavailable):
        logger.warning("answered %s: %s", code, error)
    elif not told:
        logger.error("answered %s", code, exc_info=error)
    return problem(
        code,
        str(error) if told else _untold(code),
        retry_after=_retry_after(error),
        errors=error.errors if isinstance(error, InvalidFields) else None,
    )


def problem_response(error: Exception) -> Response:
    """The answer to a call that raised `error`."""
    document = problem_document(error)
    headers = {} if document.retry_after is None else {"Retry-After": str(document.retry_after)}
    if document.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(
        document.model_dump_json(by_alias=True, exclude_none=True),
        status_code=document.status,
        headers=headers,
        media_type="application/problem+json",
    )


def _retry_after(error: Exception) -> int | None:
    if isinstance(error, LimitReached):
        return error.retry_after
    return RETRY_AFTER_SECONDS if isinstance(error, PigeonError) and error.retryable else None


def _untold(code: str) -> str:
    return "try again in a moment" if PROBLEMS[code][0] == 503 else "the request could not be answered"
