"""Requests of any shape."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.envelope import decode
from schemas.functions import ANY_PROBLEM, FUNCTIONS, Function
from schemas.http import PROBLEMS, Problem
from schemas.lifecycle import SessionState
from tests.producers.world import World

FIELDS = sorted(
    {field.alias or name for f in FUNCTIONS.values() if f.request for name, field in f.request.model_fields.items()}
    | {"path", "type", "content", "encoding", "mode"}
)
likely = st.sampled_from(
    [None, True, 0, 1, -1, 24, 1.5, 10**20, "", "ls", "a.py", "../a", "file", "base64", "eA==", "INT", "x" * 70_000]
)
values = st.recursive(
    likely | st.text(max_size=6) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=10,
)
bodies = st.dictionaries(st.sampled_from(FIELDS), values, max_size=5) | values
names = st.sampled_from([name for name in FUNCTIONS if name != "terminal-stream-output"])
queries = st.dictionaries(st.sampled_from(["path", "limit", "after", "from"]), st.text(max_size=6), max_size=2)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=300)
@given(names, bodies, queries, st.booleans())
async def test_every_answer_is_one_that_was_declared(
    world: World, name: str, body: Any, query: dict[str, str], named: bool
) -> None:
    """Never 500, always a problem document or the function's own answer; and what gets onto a topic can be read."""
    function = FUNCTIONS[name]
    session = await world.session(SessionState.QUEUED)
    published = len(world.bus.messages)
    if named and isinstance(body, dict):
        body = {**body, "sessionId": session}
    async with world.client() as client:
        path = f"/{name}/{session}" if function.by_session else f"/{name}"
        response = await client.request(function.method, path, json=body if function.request else None, params=query)
    assert response.status_code in declared(function), response.text
    if response.is_success:
        function.responses[response.status_code].model_validate_json(response.content, strict=False)
    else:
        assert PROBLEMS[Problem.model_validate_json(response.content).code][0] == response.status_code
        assert len(world.bus.messages) == published
    for message in world.bus.messages[published:]:
        decode(message)


def declared(function: Function) -> set[int]:
    return {*function.responses, *ANY_PROBLEM, *function.problems} - {500}
