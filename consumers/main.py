"""The push functions, one a subscription, so that the same handlers scale to zero:
`functions-framework --asgi --source consumers/main.py --target session_events`."""

from __future__ import annotations

import logging

import functions_framework.aio
from starlette.requests import Request
from starlette.responses import Response

from consumers.push import answer
from infra.wiring import push_services
from schemas.ports import Subscription
from schemas.topics import (
    DEAD_LETTERS_SUBSCRIPTION,
    EVENTS_SUBSCRIPTION,
    LINKS_SUBSCRIPTION,
    TICKS_SUBSCRIPTION,
)

log = logging.getLogger(__name__)


def _target(name: str, subscription: Subscription) -> functions_framework.aio.HTTPFunction:
    """The function of that name; its services are built at its first request."""

    async def target(request: Request) -> Response:
        try:
            return await answer(await push_services(), subscription, request)
        except Exception:
            log.exception("%s: the message is pushed again", name)
            return Response(status_code=503)

    target.__name__ = name
    return functions_framework.aio.http(target)


session_events = _target("session_events", EVENTS_SUBSCRIPTION)
session_links = _target("session_links", LINKS_SUBSCRIPTION)
scheduler_ticks = _target("scheduler_ticks", TICKS_SUBSCRIPTION)
dead_letters = _target("dead_letters", DEAD_LETTERS_SUBSCRIPTION)
