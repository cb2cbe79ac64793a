"""The way in, the page's files, and what is mounted."""

from __future__ import annotations

import hashlib

import httpx
import pytest

from infra.local.assets import WEB
from producers.routes import WORK
from tests.gateway.conftest import PORT, Door

LIST = "/terminal-list-sessions"


async def test_without_a_cookie_the_page_says_how_to_get_in(door: Door) -> None:
    """Nothing on the loopback gives access unasked; what to do is said in words."""
    response = await door.browser.get("/")
    assert response.status_code == 401
    assert "pigeon open" in response.text
    assert "set-cookie" not in response.headers
    assert (await door.browser.get(LIST)).status_code == 401


async def test_a_ticket_is_exchanged_for_a_cookie(door: Door) -> None:
    """The printed address opens the page; the ticket is out of the address bar and out of use afterwards."""
    address = door.access.address("alice")
    response = await door.browser.get(address)
    cookie = response.headers["set-cookie"]
    assert (response.status_code, response.headers["location"]) == (303, "/")
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Max-Age=86400" in cookie
    assert response.headers["cache-control"] == "no-store"
    page = await door.browser.get("/")
    assert page.status_code == 200
    assert "/page/page.js" in page.text
    assert (await door.browser.get(LIST)).status_code == 200


async def test_a_used_ticket_lets_nobody_in(door: Door) -> None:
    """A second browser with the same address gets no cookie; the first one keeps its own."""
    address = door.access.address("alice")
    await door.browser.get(address)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(door.guard), follow_redirects=True) as other:
        response = await other.get(address)
        assert response.status_code == 401
        assert not other.cookies
    again = await door.browser.get(address, follow_redirects=True)
    assert again.status_code == 200


@pytest.mark.parametrize("ticket", ["", "x", "%00", "%ff", "a&ticket=b"])
async def test_guesses_get_nothing(door: Door, ticket: str) -> None:
    """Whatever is in the address, only a ticket is a ticket."""
    response = await door.browser.get(f"/?ticket={ticket}")
    assert "set-cookie" not in response.headers


async def test_looking_does_not_use_a_ticket(door: Door) -> None:
    """A preview that only asks for the headers leaves the ticket good."""
    address = door.access.address("alice")
    assert "set-cookie" not in (await door.browser.head(address)).headers
    await door.enter()


async def test_a_link_from_another_site_works(door: Door) -> None:
    """Browsers withhold a strict cookie from a navigation that another site began: the page asks again itself."""
    response = await door.browser.get("/", headers={"sec-fetch-site": "cross-site"})
    assert response.headers["refresh"] == "0; url=/"
    assert "refresh" not in (await door.browser.get("/", headers={"sec-fetch-site": "same-origin"})).headers


async def test_a_fresh_address_needs_a_token(door: Door) -> None:
    """Whoever can sign for this machine can open the page as that user; the page's cookie is not enough."""
    assert (await door.browser.post("/tickets")).status_code == 401
    await door.enter()
    assert (await door.browser.post("/tickets")).status_code == 401
    for header in ("", "Bearer", "Bearer x", f"Basic {door.token()}"):
        assert (await door.browser.post("/tickets", headers={"authorization": header})).status_code == 401
    response = await door.browser.post("/tickets", headers={"authorization": f"Bearer {door.token('bob')}"})
    address = response.json()["address"]
    assert address.startswith(f"http://127.0.0.1:{PORT}/?ticket=")
    await door.browser.get(address)
    assert (await door.browser.post("/terminal-create-session", json={})).status_code == 202
    listed = await door.browser.get(LIST, headers={"authorization": f"Bearer {door.token('bob')}"})
    assert len(listed.json()["sessions"]) == 1


async def test_every_function_is_mounted(door: Door) -> None:
    """Each function answers under its name: without a token with 401, in a problem document."""
    for name in WORK:
        for path in (f"/{name}", f"/{name}/s234567"):
            for method in ("GET", "POST", "DELETE"):
                response = await door.browser.request(method, path)
                if response.status_code != 404:
                    assert response.status_code in (401, 405), path
                    assert response.headers["content-type"] == "application/problem+json"


async def test_files_are_what_they_are(door: Door) -> None:
    """Types are right, a browser that has a file is told so, and vendored files are kept for good."""
    types = {"page/page.js": "text/javascript", "page/page.css": "text/css", "page/icon.svg": "image/svg+xml"}
    for path, media_type in types.items():
        response = await door.browser.get(f"/{path}")
        assert response.content == (WEB / path).read_bytes()
        assert response.headers["content-type"].startswith(media_type)
        assert response.headers["cache-control"] == "no-cache"
        again = await door.browser.get(f"/{path}", headers={"if-none-match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    vendored = await door.browser.get("/vendor/xterm-6.0.0/xterm.mjs")
    assert vendored.headers["content-type"].startswith("text/javascript")
    assert "immutable" in vendored.headers["cache-control"]


@pytest.mark.parametrize(
    "path",
    [
        "/page/../../README.md",
        "/page/%2e%2e/%2e%2e/README.md",
        "/page/..%2f..%2fREADME.md",
        "/vendor//etc/passwd",
        "/vendor/README.md",
        "/page/page.js%00.css",
        "/page/",
        "/page/door.html",
        "/web/page/page.js",
        "/.pigeon/token.secret",
    ],
)
async def test_nothing_else_is_served(door: Door, path: str) -> None:
    """The files are a fixed table: no path leads anywhere else."""
    response = await door.browser.get(httpx.URL(f"http://127.0.0.1:{PORT}", raw_path=path.encode()))
    assert response.status_code == 404


def test_vendored_files_are_as_they_were_released() -> None:
    """What is kept has the sums that were noted when it was vendored, with a licence beside it."""
    vendor = WEB / "vendor"
    for line in (vendor / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest, name
        assert (vendor / name).with_name("LICENSE").exists()


def test_the_page_loads_nothing_from_elsewhere() -> None:
    """No address of another host in the page's own files, and no inline script."""
    for file in (WEB / "page").iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, file.name
    assert (WEB / "page" / "index.html").read_text().count("<script") == 1
