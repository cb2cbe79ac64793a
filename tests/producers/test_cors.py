"""Which pages may call."""

from __future__ import annotations

import httpx
import pytest

from schemas.functions import Function
from tests.producers.calls import ALL, call, check
from tests.producers.world import ORIGIN, World


@pytest.mark.parametrize("function", ALL)
async def test_a_preflight_allows_the_pages_on_the_list_and_no_others(
    anyone: httpx.AsyncClient, function: Function
) -> None:
    """A browser asks without a token; never a wildcard, never credentials."""
    headers = {"origin": ORIGIN, "access-control-request-method": function.method}
    response = await call(anyone, function, method="OPTIONS", headers=headers)
    assert response.status_code == 204
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert response.headers["access-control-allow-methods"] == function.method
    assert "Authorization" in response.headers["access-control-allow-headers"]
    assert int(response.headers["access-control-max-age"]) > 0
    assert response.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in response.headers
    for stranger in ("https://evil.example", "null", ORIGIN + ".evil.example", ORIGIN.upper(), ""):
        response = await call(anyone, function, method="OPTIONS", headers={"origin": stranger})
        check(response, 403, "forbidden")
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("function", ALL)
async def test_a_page_of_another_origin_is_refused_even_with_a_token(
    alice: httpx.AsyncClient, world: World, function: Function
) -> None:
    """Not only unreadable for it, but not done."""
    name = await world.session()
    check(await call(alice, function, name, headers={"origin": "https://evil.example"}), 403, "forbidden")
    assert world.events == []


async def test_a_page_on_the_list_may_read_answers_and_refusals(alice: httpx.AsyncClient) -> None:
    """Retry-After is of no use to a page that cannot see it; caches keep origins apart, also without one."""
    for status, path in ((200, "/terminal-list-sessions"), (404, "/terminal-get-status/x")):
        response = await alice.get(path, headers={"origin": ORIGIN})
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert "Retry-After" in response.headers["access-control-expose-headers"]
    response = await alice.get("/terminal-list-sessions")
    assert response.headers["vary"] == "Origin"
    assert "access-control-allow-origin" not in response.headers
