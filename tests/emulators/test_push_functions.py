"""A deployment without a worker: consumers/main.py in processes of Google's functions framework, and nothing pulls."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import consumers.main
from infra.adapters.firestore import firestore_store
from infra.adapters.pubsub import pubsub_bus
from infra.adapters.pubsub_calls import Calls
from infra.adapters.pubsub_topology import push_policy
from infra.emulators import free_port
from schemas.documents import INDEXES
from schemas.events import ClockTicked
from schemas.lifecycle import SessionState
from schemas.ports import Message, Query, Subscription
from schemas.topics import (
    DEAD_LETTERS_SUBSCRIPTION,
    EVENTS_SUBSCRIPTION,
    LINKS_SUBSCRIPTION,
    SESSION_EVENTS,
    SUBSCRIPTIONS,
    TICKS_SUBSCRIPTION,
    TOPICS,
)
from tests.consumers.house import House, house
from tests.emulators.pushing import ACCOUNT, AUDIENCE, Issuer
from tests.producers.world import served
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SOURCE = Path(consumers.main.__file__)
TARGETS = {
    "session_events": EVENTS_SUBSCRIPTION,
    "session_links": LINKS_SUBSCRIPTION,
    "scheduler_ticks": TICKS_SUBSCRIPTION,
    "dead_letters": DEAD_LETTERS_SUBSCRIPTION,
}
PATIENCE = 90.0
END_SECONDS = 10.0  # that Cloud Run gives an instance between SIGTERM and SIGKILL
LINES = 600


@dataclass
class Deployment:
    """Function instances behind a door, which adds the token that Google would, and sends each message to the newest
    instance of its function."""

    environment: dict[str, str]
    issuer: Issuer
    stack: AsyncExitStack
    newest: dict[str, str] = field(default_factory=dict)  # URLs by subscription
    pushed: set[str] = field(default_factory=set)  # subscriptions of which a message was settled

    async def deploy(self, target: str) -> asyncio.subprocess.Process:
        """One more instance; returns once it serves."""
        port = free_port()
        command = [sys.executable, "-m", "functions_framework", "--asgi", "--source", str(SOURCE), "--target", target]
        process = await asyncio.create_subprocess_exec(
            *command, "--host", "127.0.0.1", "--port", str(port), env={**os.environ, **self.environment}
        )
        self.stack.push_async_callback(_end, process)
        url = f"http://127.0.0.1:{port}"

        async def serving() -> bool:
            assert process.returncode is None, f"{target} ended"
            async with httpx.AsyncClient(trust_env=False) as client:
                try:
                    return (await client.post(url, timeout=60.0)).status_code == 401
                except httpx.TransportError:
                    return False

        await until(serving, f"{target} serves", PATIENCE)
        self.newest[TARGETS[target].name] = url
        return process

    async def push(self, request: Request) -> Response:
        """Hand a pushed message on, with a token."""
        name = request.path_params["name"]
        headers = {"authorization": f"Bearer {self.issuer.token()}", "content-type": "application/json"}
        async with httpx.AsyncClient(trust_env=False, timeout=600.0) as client:
            try:
                answer = await client.post(self.newest[name], content=await request.body(), headers=headers)
            except (httpx.TransportError, KeyError):
                return Response(status_code=502)
        if answer.is_success:
            self.pushed.add(name)
        return Response(status_code=answer.status_code)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    await process.wait()


@pytest.fixture
async def office(tmp_path: Path, python: Path, project: str, pubsub_host: str, firestore_host: str) -> Any:
    """A deployment's documents and messages, and a way to look at them; its sandboxes are in the same folder."""
    async with (
        house(tmp_path / "state", python) as opened,
        firestore_store(project, indexes=INDEXES, emulator=firestore_host) as store,
        pubsub_bus(project, pubsub_host) as bus,
    ):
        await bus.create(TOPICS, [])
        yield House(replace(opened.fellow(), store=store, bus=bus), opened.clock, opened.hired)


@pytest.fixture
async def deployment(
    office: House, tmp_path: Path, python: Path, project: str, pubsub_host: str, firestore_host: str
) -> AsyncIterator[Deployment]:
    """The door and the push subscriptions; no instance yet."""
    issuer = Issuer()
    async with AsyncExitStack() as stack, issuer.serving() as keys_url:
        environment = {
            "PIGEON_PROFILE": "emulators",
            "PIGEON_PROJECT": project,
            "PIGEON_STATE": str(tmp_path / "state"),
            "PIGEON_PYTHON": str(python),
            "PIGEON_PUSH_AUDIENCE": AUDIENCE,
            "PIGEON_PUSH_SERVICE_ACCOUNT": ACCOUNT,
            "PIGEON_PUSH_KEYS_URL": keys_url,
            "PIGEON_LIMITS": '{"pool_size": 0}',
            "PUBSUB_EMULATOR_HOST": pubsub_host,
            "FIRESTORE_EMULATOR_HOST": firestore_host,
        }
        made = Deployment(environment, issuer, stack)
        door = Starlette(routes=[Route("/{name}", made.push, methods=["POST"])])
        url = await stack.enter_async_context(served(door))
        await subscribe(pubsub_host, project, url)
        yield made


async def subscribe(host: str, project: str, url: str) -> None:
    """What Terraform does: the declared subscriptions, pushed to the door."""

    async def make(subscription: Subscription) -> None:
        endpoint = f"{url}/{subscription.name}"
        resource = push_policy(calls, subscription, endpoint=endpoint, service_account=ACCOUNT, audience=AUDIENCE)
        await calls.subscriber.create_subscription(resource)

    async with grpc.aio.insecure_channel(host) as channel:
        calls = Calls(channel, project)
        for subscription in SUBSCRIPTIONS:
            await make(subscription)


async def test_a_session_lives_on_functions_alone(office: House, deployment: Deployment) -> None:
    """Requests, commands, ticks and dead letters are pushed; nobody pulls. An instance that is asked to end hands its
    session to another in time: the program prints on, and not a byte is missing."""
    instances = await asyncio.gather(*(deployment.deploy(target) for target in TARGETS))
    tender = instances[list(TARGETS).index("session_links")]
    session = await office.ready()
    record, output = await office.run(session, "echo pushed")
    assert (record.exit_code, output) == (0, b"pushed\r\n")

    forgotten = await office.record(deadline=office.clock.now() - timedelta(seconds=1))  # requested, never published
    await office.publish(ClockTicked(at=office.clock.now()), "")
    await office.until_state(forgotten, SessionState.READY)

    await office.context.bus.publish(SESSION_EVENTS, Message(b"no event"))

    async def buried() -> bool:
        return [one.data["data"] for one in await office.context.store.query(Query("deadLetters"))] == [b"no event"]

    await until(buried, "the dead letter is kept", PATIENCE)
    assert deployment.pushed >= {EVENTS_SUBSCRIPTION.name, TICKS_SUBSCRIPTION.name, DEAD_LETTERS_SUBSCRIPTION.name}
    await handed_over_at_sigterm(office, deployment, session, tender)


async def handed_over_at_sigterm(
    office: House, deployment: Deployment, session: str, tender: asyncio.subprocess.Process
) -> None:
    """In the middle of output."""
    command = await office.submit(session, f"for i in $(seq 1 {LINES}); do echo line $i; sleep 0.01; done")

    async def printing() -> bool:
        return b"line 20\r\n" in await office.transcript(session)

    await until(printing, "the program prints")
    await deployment.deploy("session_links")
    before = (await office.session(session)).epoch
    tender.send_signal(signal.SIGTERM)
    async with asyncio.timeout(END_SECONDS):
        assert await tender.wait() == 0

    async def taken_over() -> bool:
        return (await office.session(session)).epoch == before + 1

    await until(taken_over, "another instance tends the session")
    record = await office.ended(session, command)
    assert record.exit_code == 0
    expected = b"".join(b"line %d\r\n" % number for number in range(1, LINES + 1))
    assert (await office.transcript(session))[record.start_offset : record.end_offset] == expected
    await office.submit(session, "exit 3")
    assert (await office.until_state(session, SessionState.CLOSED)).final_offset is not None
