"""What other web pages, other names and other people try at the gateway."""

from __future__ import annotations

import pytest

from tests.gateway.conftest import ALLOWED, PORT, Door

OWN = f"http://127.0.0.1:{PORT}"
CREATE = "/terminal-create-session"
LIST = "/terminal-list-sessions"
REBINDING = ["evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:80", f"127.0.0.1.evil.example:{PORT}", ""]
FOREIGN = [
    "https://evil.example",
    "http://127.0.0.1:9999",
    f"https://127.0.0.1:{PORT}",
    f"http://localhost:{PORT}",
    f"http://127.0.0.1:{PORT}.evil.example",
    "null",
    "",
]


@pytest.mark.parametrize("host", REBINDING)
@pytest.mark.parametrize("path", ["/", LIST, "/page/page.js", "/healthz"])
async def test_other_names_for_this_machine_are_refused(door: Door, host: str, path: str) -> None:
    """A name that an attacker points at 127.0.0.1 gets nothing, not even the page, cookie or no cookie."""
    await door.enter()
    response = await door.browser.get(path, headers={"host": host})
    assert (response.status_code, response.json()["code"]) == (421, "bad_host")


async def test_two_hosts_are_no_host(door: Door) -> None:
    """A request that names two hosts is refused: somebody else may have looked at the other one."""
    headers = [("host", f"127.0.0.1:{PORT}"), ("host", f"127.0.0.1:{PORT}")]
    assert (await door.browser.get("/", headers=headers)).status_code == 421


async def test_localhost_is_a_name_of_ours(door: Door) -> None:
    """Both names under which people type the address work."""
    response = await door.browser.get("/healthz", headers={"host": f"localhost:{PORT}"})
    assert response.json() == {"status": "ok"}


@pytest.mark.parametrize("origin", FOREIGN)
async def test_other_sites_pages_change_nothing(door: Door, origin: str) -> None:
    """A post from another origin is refused, with the cookie and with a token alike."""
    await door.enter()
    for headers in ({}, {"authorization": f"Bearer {door.token()}"}):
        response = await door.browser.post(CREATE, json={}, headers={"origin": origin, **headers})
        assert (response.status_code, response.json()["code"]) == (403, "bad_origin")


@pytest.mark.parametrize("origin", FOREIGN)
async def test_other_sites_pages_read_nothing(door: Door, origin: str) -> None:
    """The cookie is worth nothing in another origin's request."""
    await door.enter()
    response = await door.browser.get(LIST, headers={"origin": origin})
    assert (response.status_code, response.json()["code"]) == (403, "bad_origin")
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("site", ["cross-site", "same-site", "new-value"])
async def test_requests_without_an_origin_are_judged_by_their_site(door: Door, site: str) -> None:
    """Images, scripts and forms carry no Origin, but browsers say where they come from."""
    await door.enter()
    headers = {"sec-fetch-site": site}
    assert (await door.browser.post(CREATE, json={}, headers=headers)).json()["code"] == "bad_origin"
    assert (await door.browser.get(LIST, headers=headers)).json()["code"] == "unauthenticated"


async def test_our_own_page_is_let_through(door: Door) -> None:
    """The page's cookie becomes its Authorization, and its Origin is no cross-origin one."""
    await door.enter()
    own = {"origin": OWN, "sec-fetch-site": "same-origin"}
    created = await door.browser.post(CREATE, json={}, headers=own)
    assert created.status_code == 202, created.text
    listed = await door.browser.get(LIST, headers={"sec-fetch-site": "same-origin"})
    assert [session["sessionId"] for session in listed.json()["sessions"]] == [created.json()["sessionId"]]


async def test_a_token_wins_over_the_cookie(door: Door) -> None:
    """Who brings a token is who it says, also in a browser that is somebody else."""
    await door.enter("alice")
    await door.browser.post(CREATE, json={})
    headers = {"authorization": f"Bearer {door.token('bob')}"}
    assert (await door.browser.get(LIST, headers=headers)).json() == {"sessions": []}


async def test_an_allowed_origin_needs_its_own_token(door: Door) -> None:
    """The allow-list lets another site's page in with a token, never with this page's cookie."""
    await door.enter()
    theirs = {"origin": ALLOWED, "sec-fetch-site": "cross-site"}
    assert (await door.browser.post(CREATE, json={}, headers=theirs)).status_code == 401
    preflight = {**theirs, "access-control-request-method": "POST"}
    assert (await door.browser.options(CREATE, headers=preflight)).headers["access-control-allow-origin"] == ALLOWED
    signed = {**theirs, "authorization": f"Bearer {door.token()}"}
    created = await door.browser.post(CREATE, json={}, headers=signed)
    assert (created.status_code, created.headers["access-control-allow-origin"]) == (202, ALLOWED)


async def test_a_forged_cookie_is_no_cookie(door: Door) -> None:
    """What is in the cookie is verified like any token; other programs' cookies do not get in the way."""
    for value in ("", "x", door.token() + "x", "a.b.c", "é"):
        assert (await door.browser.get(LIST, headers=among_others(value))).status_code == 401
    assert (await door.browser.get(LIST, headers=among_others(door.token()))).status_code == 200


def among_others(value: str) -> list[tuple[bytes, bytes]]:
    return [(b"cookie", f'other={{"weird":1}}; pigeon_{PORT}={value}; more'.encode())]


async def test_a_stack_that_closes_takes_nothing_new(door: Door) -> None:
    """Readers may see the end of their sessions; whoever wants to change something is told to come again."""
    await door.enter()
    door.guard.closing = True
    response = await door.browser.post(CREATE, json={})
    assert (response.status_code, response.json()["code"]) == (503, "unavailable")
    assert response.headers["retry-after"] == "10"
    assert (await door.browser.get(LIST)).status_code == 200


@pytest.mark.parametrize("path", ["/", "/page/page.js", LIST, CREATE, "/nothing", "/healthz"])
async def test_every_answer_carries_the_security_headers(door: Door, path: str) -> None:
    """No inline script, no frames, no sniffing, no referrer; each header once."""
    headers = (await door.browser.get(path)).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert headers.get_list("x-content-type-options") == ["nosniff"]
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
