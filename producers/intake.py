"""The door: everything that a request says is checked here, and inside there are only types."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from producers.problems import InvalidFields, UnsupportedMediaType
from producers.services import Services
from schemas.documents import Session, session_path
from schemas.envelope import TRACEPARENT
from schemas.errors import Malformed, SessionEnded, TooLarge, Unauthenticated, UnknownSession
from schemas.events import ClientId
from schemas.ids import is_session_id, new_id
from schemas.lifecycle import TAKES_INPUT
from schemas.limits import MAX_BODY_BYTES
from schemas.model import Model
from schemas.ports import Principal

M = TypeVar("M", bound=Model)
T = TypeVar("T")

CLIENT_ID: TypeAdapter[str] = TypeAdapter(ClientId)
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Call:
    """A request of a verified caller."""

    request: Request
    services: Services
    principal: Principal

    @property
    def traceparent(self) -> str:
        """The caller's trace context, "" if there is none in the W3C format."""
        value = self.request.headers.get("traceparent", "")
        return value if TRACEPARENT.fullmatch(value) else ""

    @property
    def last_segment(self) -> str:
        """The last segment of the path: the session id, both behind a gateway and as a function of its own."""
        return str(self.request.scope["path"]).rstrip("/").rpartition("/")[2]

    def query(self, name: str, kind: TypeAdapter[T], default: T) -> T:
        """A parameter of the query string, read as `kind`. Raises Malformed."""
        value = self.request.query_params.get(name)
        return default if value is None else parameter(name, kind, value)


def parameter(name: str, kind: TypeAdapter[T], value: str) -> T:
    """Read a parameter's text as `kind`. Raises Malformed."""
    try:
        return kind.validate_strings(value)
    except ValidationError as error:
        raise Malformed(f"{name}: {error.errors(include_url=False)[0]['msg']}") from error


def reply(model: Model, status: int = 200) -> Response:
    """The JSON answer."""
    return Response(model.model_dump_json(by_alias=True), status_code=status, media_type="application/json")


def bearer_token(request: Request) -> str:
    """The access token. Raises Unauthenticated if there is none, or more than one."""
    values = request.headers.getlist("authorization")
    scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("an 'Authorization: Bearer' header with an access token is needed")
    return token.strip()


async def read_body(call: Call, model: type[M]) -> M:
    """The request's body. Raises UnsupportedMediaType, TooLarge or Malformed."""
    return validated(model, parse_json(await _bytes(call.request)))


def validated(model: type[M], value: Any) -> M:
    """`value` as a model. Raises InvalidFields, which names each field that is wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise InvalidFields(error) from error


async def _bytes(request: Request) -> bytes:
    _check_media_type(request.headers.get("content-type", ""))
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
        raise _body_too_large()
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise _body_too_large()
        parts.append(part)
    return b"".join(parts)


def _check_media_type(content_type: str) -> None:
    media_type, _, parameters = content_type.partition(";")
    charset = parameters.replace(" ", "").replace('"', "").lower()
    if media_type.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
        raise UnsupportedMediaType("the body must be application/json in UTF-8")


def _body_too_large() -> TooLarge:
    return TooLarge(f"a request's body has at most {MAX_BODY_BYTES} bytes")


def parse_json(body: bytes) -> Any:
    """Strict JSON (RFC 8259 and I-JSON): duplicate names, NaN, lone surrogates and bad UTF-8 raise Malformed."""
    try:
        value = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
        if SURROGATE_ESCAPE.search(body):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise Malformed("the body is nested too deeply") from error
    except UnicodeError as error:
        raise Malformed("the body is not valid Unicode") from error
    except ValueError as error:
        raise Malformed(f"the body is not valid JSON: {error}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name is given twice")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def request_id(call: Call, from_body: str | None) -> str:
    """What makes a repeated request the same: from the body, else the Idempotency-Key header, else a random id."""
    header = call.request.headers.get("idempotency-key")
    if from_body is not None or header is None:
        return from_body or new_id()
    return parameter("Idempotency-Key", CLIENT_ID, header.strip('"'))


async def visible_session(call: Call, session: str) -> Session:
    """A session that the caller may look at: their own, or any for an administrator. Raises UnknownSession."""
    snapshot = await call.services.store.get(session_path(session)) if is_session_id(session) else None
    if snapshot is not None:
        found = Session.of(snapshot)
        if found.user_id == call.principal.user or call.principal.admin:
            return found
    raise UnknownSession("there is no such session")


async def own_session(call: Call, session: str) -> Session:
    """A session that the caller may act in: their own and nobody else's. Raises UnknownSession."""
    found = await visible_session(call, session)
    if found.user_id != call.principal.user:
        raise UnknownSession("there is no such session")
    return found


async def open_session(call: Call, session: str) -> Session:
    """The caller's own session, if it still takes input. Raises UnknownSession or SessionEnded."""
    found = await own_session(call, session)
    if found.state not in TAKES_INPUT:
        raise SessionEnded(f"the session is {found.state}")
    return found
