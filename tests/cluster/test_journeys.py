"""The journeys of a person, with pods of a real cluster for sandboxes and a worker that may do what its Role says."""

from __future__ import annotations

import pytest

from tests.cluster.deployment import Deployment
from tests.journeys.stack import User
from tests.journeys.test_session import *  # noqa: F403 - every journey, none left out

pytestmark = pytest.mark.slow


async def test_a_closed_session_has_no_pod(alice: User, deployment: Deployment) -> None:
    """Who is told that a session is closed pays for it no longer."""
    session = await alice.ready()
    assert deployment.pod(session)["status"]["phase"] == "Running"
    await alice.call("DELETE", f"cleanup-session/{session}")
    await alice.transcript(session)
    assert (await alice.status(session))["state"] == "closed"
    assert deployment.pods() == []
