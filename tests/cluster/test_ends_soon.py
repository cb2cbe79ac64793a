"""A session whose pod is told to go ends as soon as it has said its last, not when the pod's grace is over."""

from __future__ import annotations

import time

import pytest

from infra.adapters.kube_pod import GRACE_SECONDS
from tests.cluster.deployment import Deployment
from tests.cluster.stacks import PATIENCE
from tests.journeys.stack import User

pytestmark = pytest.mark.slow


async def test_a_pod_deleted_with_its_whole_grace_does_not_take_it(alice: User, deployment: Deployment) -> None:
    """The kubelet waits for the agent, whatever is asked of it later; the agent, for its last word to be recorded."""
    session = await alice.ready()
    command = await alice.execute(session, "echo before; sleep 600")
    await alice.until_output(session, b"before\r\n")
    name = deployment.pod(session)["metadata"]["name"]
    began = time.monotonic()
    deployment.sandboxes.kubectl("delete", "pod", name, "--wait=false")
    output = await alice.transcript(session, PATIENCE)
    seconds = time.monotonic() - began
    status = await alice.status(session)
    assert (status["state"], status["reason"]) == ("closed", "The session is closed. It was deleted.")
    assert (output.end, output.gaps) == ({"finalOffset": output.offset}, [])
    assert (await alice.ended(session, command))["state"] == "killed"
    assert seconds < GRACE_SECONDS / 2
