"""The journeys of a person, on Google's emulators: the same promises, other adapters."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator

import pytest

from tests.journeys.conftest import MakeStack, make_stack
from tests.journeys.stack import Stack, User
from tests.journeys.test_session import *  # noqa: F403 - every journey, none left out

__all__ = ["make_stack"]


@pytest.fixture
async def stack(make_stack: MakeStack, firestore_host: str, pubsub_host: str, project: str) -> Stack:
    """A whole stack whose bus and store are the emulators, in a project of its own."""
    whole = make_stack(
        PIGEON_PROFILE="emulators",
        PIGEON_PROJECT=project,
        FIRESTORE_EMULATOR_HOST=firestore_host,
        PUBSUB_EMULATOR_HOST=pubsub_host,
    )
    await whole.start()
    return whole


@pytest.fixture
async def alice(stack: Stack) -> AsyncIterator[User]:
    """A signed-in user."""
    async with stack.user("alice") as user:
        yield user


async def test_a_browser_gets_a_token_for_its_own_user(alice: User) -> None:
    """With it the page listens to Firestore itself, as the same user and nobody else."""
    answer = await alice.call("POST", "firestore-token", expect=200, json={})
    claims = json.loads(base64.urlsafe_b64decode(answer["token"].split(".")[1] + "=="))
    assert claims["uid"] == "alice"
