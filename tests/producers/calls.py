"""A proper call of each function, and what a refusal looks like."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from schemas.functions import FUNCTIONS, Function
from schemas.http import PROBLEMS, Problem

BODIES: dict[str, dict[str, Any]] = {
    "terminal-execute-command": {"command": "ls"},
    "terminal-get-output": {"cursor": 0},
    "terminal-send-input": {"text": "x"},
    "terminal-resize": {"rows": 24, "cols": 80},
    "terminal-signal": {"signal": "INT"},
    "terminal-sync-files": {"fileStructure": [{"path": "a.py", "type": "file", "content": "1"}]},
}
QUERIES = {"terminal-read-file": {"path": "a.py"}}
ALL = [pytest.param(function, id=function.name) for function in FUNCTIONS.values()]
WITH_BODY = [pytest.param(function, id=function.name) for function in FUNCTIONS.values() if function.request]
OF_A_SESSION = [
    pytest.param(function, id=function.name)
    for function in FUNCTIONS.values()
    if function.by_session or function.name in BODIES
]
ACTING = [
    pytest.param(FUNCTIONS[name], id=name)
    for name in (*(name for name in BODIES if name != "terminal-get-output"), "terminal-list-files", *QUERIES)
]


async def call(
    client: httpx.AsyncClient, function: Function, session: str = "s" + "a" * 25, **arguments: Any
) -> httpx.Response:
    """Call a function properly, but for what `arguments` say."""
    path = f"/{function.name}/{session}" if function.by_session else f"/{function.name}"
    if function.request is not None and not {"content", "json"} & arguments.keys():
        arguments["json"] = {"sessionId": session, **BODIES.get(function.name, {})}
    arguments.setdefault("params", QUERIES.get(function.name))
    return await client.request(arguments.pop("method", function.method), path, **arguments)


def check(response: httpx.Response, status: int, code: str) -> Problem:
    """Assert that this is the problem document of that code."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    problem = Problem.model_validate_json(response.content)
    assert (problem.status, problem.code, problem.type) == (status, code, f"urn:problem-type:pigeon:{code}")
    assert problem.title == PROBLEMS[code][1]
    assert response.headers["cache-control"] == "no-store"
    return problem
