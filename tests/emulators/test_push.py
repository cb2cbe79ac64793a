"""Push: who may, what is understood, how a verdict becomes an answer, and a whole session on nothing else."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from starlette.requests import Request
from starlette.responses import Response

from consumers.push import PushServices, answer, read
from infra.adapters.pubsub import PubsubBus
from infra.adapters.pubsub_calls import Calls
from infra.adapters.pubsub_topology import push_policy
from infra.local.database import Database
from infra.local.store import LocalStore
from schemas.documents import INDEXES
from schemas.envelope import encode, wrap
from schemas.errors import Forbidden, Malformed, Unauthenticated
from schemas.events import ClockTicked, SessionRequested
from schemas.lifecycle import SessionState
from schemas.ports import Message, Subscription
from schemas.topics import (
    DEAD_LETTERS_SUBSCRIPTION,
    EVENTS_SUBSCRIPTION,
    LINKS_SUBSCRIPTION,
    TICKS_SUBSCRIPTION,
    TOPICS,
)
from tests.consumers.house import House, house
from tests.contracts.waiting import soon
from tests.emulators.fixtures import project, pubsub_host
from tests.emulators.pushing import ACCOUNT, AUDIENCE, Issuer, functions, wrapped
from tests.waiting import until

__all__ = ["project", "pubsub_host"]


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    """Stands for Google."""
    return Issuer()


@pytest.fixture
async def services(tmp_path: Path, python: Path, issuer: Issuer) -> AsyncIterator[PushServices]:
    """The push functions of a deployment without a worker."""
    async with house(tmp_path / "state", python) as opened, issuer.identity() as identity:
        yield PushServices(opened.context, identity)


async def push(services: PushServices, subscription: Subscription, body: bytes, token: str) -> Response:
    """One push request."""
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {token}".encode()), (b"content-type", b"application/json")],
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return await answer(services, subscription, Request(scope, receive))


def requested(session: str) -> Message:
    """An event of that session."""
    event = SessionRequested(user_id="alice")
    return encode(wrap(event, subject=session, source="/test", time=datetime.now(UTC)))


async def test_the_service_accounts_token_is_accepted(issuer: Issuer) -> None:
    """A token that Google signed for our audience and our pusher."""
    async with issuer.identity() as identity:
        await identity.verify(issuer.token())


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "https://accounts.example"},
        {"aud": "https://other.example"},
        {"exp": datetime(2020, 1, 1, tzinfo=UTC)},
        {"iat": datetime.now(UTC) + timedelta(hours=1)},
        {"exp": None},
        {"aud": None},
        {"key_id": "unknown"},
    ],
    ids=str,
)
async def test_a_token_of_another_make_is_refused(issuer: Issuer, changes: dict[str, Any]) -> None:
    """Issuer, audience, time and key all count."""
    async with issuer.identity() as identity:
        with pytest.raises(Unauthenticated):
            await identity.verify(issuer.token(**changes))


@pytest.mark.parametrize("changes", [{"email": "x@y.example"}, {"email_verified": False}, {"email": None}], ids=str)
async def test_another_account_may_not_push(issuer: Issuer, changes: dict[str, Any]) -> None:
    """Anybody can make Google sign a token for our audience; only our pusher's counts."""
    async with issuer.identity() as identity:
        with pytest.raises(Forbidden):
            await identity.verify(issuer.token(**changes))


async def test_a_forged_signature_is_refused(issuer: Issuer) -> None:
    """The right claims, signed by somebody else, and no token at all."""
    async with issuer.identity() as identity:
        for token in (Issuer().token(), "", "a.b.c", "x" * 10_000):
            with pytest.raises(Unauthenticated):
                await identity.verify(token)


def ticked() -> Message:
    """The scheduler's tick."""
    now = datetime.now(UTC)
    return encode(wrap(ClockTicked(at=now), subject="", source="/test", time=now))


MESSAGE = replace(requested("s" * 26), ordering_key="s" * 26)


def test_a_wrapped_push_is_read() -> None:
    """Data, attributes, key, id, time and attempt; Eventarc's binary events have the same body."""
    delivery = read({"content-type": "application/json", "ce-type": "of the carrier"}, wrapped(MESSAGE, attempt=3))
    assert (delivery.message, delivery.message_id, delivery.attempt) == (MESSAGE, "17", 3)
    assert delivery.published_at == datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)


def test_a_structured_event_of_eventarc_is_read() -> None:
    """The push body is the event's data."""
    body = json.dumps({"specversion": "1.0", "type": "google.cloud.pubsub", "data": json.loads(wrapped(MESSAGE))})
    delivery = read({"content-type": "application/cloudevents+json; charset=utf-8"}, body.encode())
    assert delivery.message == MESSAGE


def test_an_unwrapped_push_is_read() -> None:
    """The attributes are headers then, among all the others."""
    metadata = {"message-id": "17", "publish-time": "2026-01-02T03:04:05Z", "ordering-key": MESSAGE.ordering_key}
    headers = {
        **MESSAGE.attributes,
        "host": "x",
        **{f"x-goog-pubsub-{name}": value for name, value in metadata.items()},
    }
    delivery = read(headers, MESSAGE.data)
    assert (delivery.message, delivery.message_id, delivery.attempt) == (MESSAGE, "17", 1)


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b'{"message": {}}', wrapped(MESSAGE).replace(b'"data": "', b'"data": "#')]
)
def test_what_is_no_push_is_malformed(body: bytes) -> None:
    """Pub/Sub does not send it; whoever did is told."""
    with pytest.raises(Malformed):
        read({}, body)


async def test_answers_say_what_became_of_a_message(services: PushServices, issuer: Issuer) -> None:
    """Done and refused messages are settled, with the refused ones among the dead letters; strangers are sent away."""
    tick, bad = wrapped(ticked()), wrapped(Message(b"no event"))
    assert (await push(services, TICKS_SUBSCRIPTION, tick, issuer.token())).status_code == 204
    assert (await push(services, EVENTS_SUBSCRIPTION, bad, issuer.token())).status_code == 204
    async with services.context.bus.pull(DEAD_LETTERS_SUBSCRIPTION) as dead:
        letter = await soon(anext(dead))
        assert letter.message.data == b"no event"
        await letter.ack()
    assert (await push(services, TICKS_SUBSCRIPTION, tick, Issuer().token())).status_code == 401
    assert (await push(services, TICKS_SUBSCRIPTION, tick, issuer.token(email="x"))).status_code == 403
    assert (await push(services, EVENTS_SUBSCRIPTION, b"{}", issuer.token())).status_code == 400


async def test_a_message_that_cannot_be_handled_now_is_pushed_again(
    services: PushServices, issuer: Issuer, tmp_path: Path
) -> None:
    """503, so that Pub/Sub backs off."""
    async with Database(tmp_path / "closed.db") as database:
        store = LocalStore(database, indexes=INDEXES)
    broken = replace(services, context=replace(services.context, store=store))
    response = await push(broken, TICKS_SUBSCRIPTION, wrapped(ticked()), issuer.token())
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


async def test_a_request_that_takes_too_long_is_given_up(
    services: PushServices, issuer: Issuer, tmp_path: Path
) -> None:
    """Pub/Sub has pushed the message elsewhere by then: an answer before that keeps the two apart."""
    async with Database(tmp_path / "closed.db") as database:
        store = LocalStore(database, indexes=INDEXES)
    short = replace(services, context=replace(services.context, store=store), answer_seconds=0.2)
    response = await push(short, EVENTS_SUBSCRIPTION, wrapped(requested("s" * 26)), issuer.token())
    assert response.status_code == 503


async def push_subscriptions(host: str, project: str, url: str, wanted: list[Subscription]) -> None:
    """Push subscriptions on the emulator, at the functions' address."""
    async with grpc.aio.insecure_channel(host) as channel:
        calls = Calls(channel, project)
        for subscription in wanted:
            endpoint = f"{url}/{subscription.name}"
            resource = push_policy(calls, subscription, endpoint=endpoint, service_account=ACCOUNT, audience=AUDIENCE)
            await calls.subscriber.create_subscription(resource)


async def the_session_runs(opened: House, epochs: int) -> None:
    """From its request over a command to its end, handed on that often."""
    session = await opened.ready()
    record, output = await opened.run(session, "echo pushed")
    assert (record.exit_code, b"pushed" in output) == (0, True)

    async def handed_on() -> bool:
        return (await opened.session(session)).epoch >= epochs

    await until(handed_on, "the session was handed on")
    record, output = await opened.run(session, "exit 3")
    assert (await opened.until_state(session, SessionState.CLOSED)).final_offset is not None


@pytest.mark.slow
async def test_a_session_runs_on_push_alone(
    tmp_path: Path, python: Path, issuer: Issuer, pubsub_host: str, project: str
) -> None:
    """No worker pulls: the emulator pushes every message to the functions, and the session outlives its tender's
    requests, each of which hands it on before its deadline."""
    wanted = [EVENTS_SUBSCRIPTION, LINKS_SUBSCRIPTION]
    async with (
        house(tmp_path / "state", python) as opened,
        issuer.identity() as identity,
        grpc.aio.insecure_channel(pubsub_host) as channel,
    ):
        bus = PubsubBus(channel, project)
        await bus.create(TOPICS, [])
        opened.context = replace(opened.context, bus=bus)
        services = PushServices(opened.context, identity, hand_over_seconds=2.0)
        async with functions(services, wanted, issuer) as url:
            await push_subscriptions(pubsub_host, project, url, wanted)
            await the_session_runs(opened, epochs=3)
