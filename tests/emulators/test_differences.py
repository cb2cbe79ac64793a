"""Where Google's Pub/Sub emulator is not Pub/Sub. A test here fails when a difference goes away: strike it from
docs/emulators.md then, and see what was done because of it. Those of Firestore are in test_firestore.py."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc.aio
import pytest
from google.api_core import exceptions
from google.pubsub_v1.types import StreamingPullRequest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from infra.adapters.pubsub_calls import CHANNEL_OPTIONS, Calls
from infra.adapters.pubsub_topology import push_policy
from schemas.ports import Message, Subscription
from schemas.topics import DEAD_LETTERS
from tests.contracts.waiting import soon
from tests.producers.world import served

TOPIC, READER = "happenings", "reader"
DEADLINE = 10  # seconds: Pub/Sub's least, which the emulator undercuts
HELD = Subscription("held", TOPIC, ack_deadline=1.0)


@pytest.fixture
async def calls(pubsub_host: str, project: str) -> AsyncIterator[Calls]:
    """The bare calls, and a topic."""
    async with grpc.aio.insecure_channel(pubsub_host, options=CHANNEL_OPTIONS) as channel:
        made = Calls(channel, project)
        for topic in (TOPIC, DEAD_LETTERS):
            await made.publisher.create_topic({"name": made.topic(topic)})
        yield made


async def subscribe(calls: Calls, **policy: Any) -> None:
    """One subscription."""
    resource = {"name": calls.subscription(READER), "topic": calls.topic(TOPIC), "ack_deadline_seconds": DEADLINE}
    await calls.subscriber.create_subscription({**resource, **policy})


async def publish(calls: Calls, *texts: bytes, key: str = "") -> None:
    """One after another."""
    for text in texts:
        await calls.publish(TOPIC, [Message(text, {"colour": "red"}, key)])


async def pull(calls: Calls, within: float) -> list[tuple[bytes, str]]:
    """What comes of one pull in that time (seconds), with its ack ids. It ends by its deadline: a cancelled one would
    stay open in the emulator."""
    request = {"subscription": calls.subscription(READER), "max_messages": 10}
    try:
        response = await calls.subscriber.pull(request, retry=None, timeout=within)
    except exceptions.DeadlineExceeded:
        return []
    return [(received.message.data, received.ack_id) for received in response.received_messages]


def texts(pulled: list[tuple[bytes, str]]) -> list[bytes]:
    """What the messages say."""
    return [text for text, _ in pulled]


@pytest.mark.slow
async def test_a_cancelled_stream_keeps_its_ordering_keys(calls: Calls) -> None:
    """The cloud gives them to others at the deadline; so our adapter has no streams."""
    await subscribe(calls, enable_message_ordering=True)
    await publish(calls, b"1", key="k")

    async def requests() -> AsyncIterator[StreamingPullRequest]:
        yield StreamingPullRequest(subscription=calls.subscription(READER), stream_ack_deadline_seconds=DEADLINE)
        await asyncio.Event().wait()

    stream: Any = await calls.subscriber.streaming_pull(requests())
    response = await soon(anext(aiter(stream)))
    assert [received.message.data for received in response.received_messages] == [b"1"]
    stream.cancel()
    await publish(calls, b"2", key="k")
    assert await pull(calls, DEADLINE * 1.5) == []


async def test_a_message_given_back_waits_for_those_behind_it(calls: Calls) -> None:
    """The cloud delivers it again, and its key's later messages behind it; our adapter gives those back with it."""
    await subscribe(calls, enable_message_ordering=True)
    await publish(calls, b"1", b"2", b"3", key="k")
    held: dict[bytes, str] = {}
    while len(held) < 3:
        held |= dict(await soon(pull(calls, 5.0)))
    await calls.extend(READER, [held[b"1"]], 0, within=5.0)
    assert texts(await pull(calls, 1.0)) == []
    await calls.extend(READER, [held[b"2"], held[b"3"]], 0, within=5.0)
    assert texts(await pull(calls, 5.0)) == [b"1", b"2", b"3"]


async def test_filters_are_ignored(calls: Calls) -> None:
    """So we have none."""
    await subscribe(calls, filter='attributes.colour = "blue"')
    await publish(calls, b"red")
    assert texts(await pull(calls, 5.0)) == [b"red"]


async def test_a_deadline_of_a_second_is_taken(calls: Calls) -> None:
    """The cloud takes ten at the least; so tests of deadlines take seconds here, and the declared ones are its own."""
    await subscribe(calls, ack_deadline_seconds=1)
    await publish(calls, b"1")
    assert texts(await pull(calls, 5.0)) == texts(await pull(calls, 5.0)) == [b"1"]


async def test_a_push_says_less(calls: Calls) -> None:
    """No token, no ordering key, no count of attempts; so the session is the event's subject, too, and tests put a
    door in front of the functions that adds what Google would."""
    requests: asyncio.Queue[tuple[dict[str, str], dict[str, Any]]] = asyncio.Queue()

    async def take(request: Request) -> Response:
        await requests.put((dict(request.headers), json.loads(await request.body())))
        return Response(status_code=204)

    async with served(Starlette(routes=[Route("/", take, methods=["POST"])])) as url:
        policy = push_policy(calls, HELD, endpoint=url, service_account="x@y.example", audience=url)
        await calls.subscriber.create_subscription({**policy, "enable_message_ordering": True})
        await publish(calls, b"1", key="k")
        headers, body = await soon(requests.get())
    assert "authorization" not in headers
    assert "deliveryAttempt" not in body
    assert not {"orderingKey", "ordering_key"} & body["message"].keys()


async def test_messages_leave_on_a_tick(calls: Calls) -> None:
    """A pull that waits is answered every 50 ms or so: half of what a command takes on the emulators is that. In the
    cloud it is answered at once."""
    await subscribe(calls)
    loop, took = asyncio.get_running_loop(), []
    for _ in range(20):
        waiting = asyncio.ensure_future(pull(calls, 10.0))
        await asyncio.sleep(0.01)  # it waits by then
        started = loop.time()
        await publish(calls, b"x")
        ((_, ack_id),) = await waiting
        took.append(loop.time() - started)
        await calls.acknowledge(READER, [ack_id])
    assert statistics.median(took) > 0.010, timedelta(seconds=statistics.median(took))


async def test_nobody_is_asked_for_a_permission(calls: Calls) -> None:
    """Who may publish and pull is said in Terraform, and only the cloud checks it."""
    with pytest.raises(exceptions.MethodNotImplemented):
        await calls.subscriber.get_iam_policy({"resource": calls.topic(TOPIC)})
