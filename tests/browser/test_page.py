"""The page in a real browser, on a real stack."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.browser.chromium import Browser, Page
from tests.cli.pigeon import Pigeon

pytestmark = pytest.mark.slow

SCREEN = "document.querySelector('.xterm-rows').innerText"


def address(pigeon: Pigeon, user: str) -> str:
    """A fresh address of the page."""
    return pigeon.run("open", "-u", user).stdout.decode().strip()


def enter(page: Page, pigeon: Pigeon, user: str) -> None:
    """Open the page and wait for the prompt."""
    page.open(address(pigeon, user))
    state(page, "ready")
    shows(page, "$")


def shows(page: Page, text: str) -> None:
    page.until(f"{SCREEN}.includes({json.dumps(text)})")


def state(page: Page, name: str) -> None:
    page.until(f"document.getElementById('badge').dataset.state === '{name}'")


def click(page: Page, selector: str) -> None:
    page.until(f"document.querySelector('{selector}') && !document.querySelector('{selector}').disabled")
    page.evaluate(f"document.querySelector('{selector}').click()")


def close_all(pigeon: Pigeon, user: str) -> None:
    for session in json.loads(pigeon.run("sessions", "-u", user, "--json").stdout):
        pigeon.run("close", session["sessionId"], "-u", user)


@contextmanager
def session_of(page: Page, pigeon: Pigeon, user: str) -> Iterator[None]:
    """The page at its prompt; the user's sessions are ended afterwards."""
    try:
        enter(page, pigeon, user)
        yield
    finally:
        close_all(pigeon, user)


def test_a_terminal_is_an_address_away(page: Page, pigeon: Pigeon) -> None:
    """Open the printed address, type, see; reload, and it is all still there."""
    with session_of(page, pigeon, "walker"):
        assert "ticket" not in page.evaluate("location.href")
        page.type("echo six times seven is $((6 * 7))\n")
        shows(page, "six times seven is 42")
        page.type("printf 'caf\\u00e9 \\342\\234\\223\\n'\n")
        shows(page, "café ✓")
        page.reload()
        shows(page, "six times seven is 42")
        shows(page, "café ✓")
        page.type("echo and on it goes $((1 + 1))\n")
        shows(page, "and on it goes 2")


def test_keys_arrive_in_order(page: Page, pigeon: Pigeon) -> None:
    """However fast somebody types, every key arrives once and in its place, bytes beyond ASCII too."""
    typed = "".join(chr(97 + i % 26) for i in range(300)) + "äöü€"
    text = typed + "𝄞 👩‍🚀"
    with session_of(page, pigeon, "racer"):
        page.type(f"X='{typed}")
        page.insert("𝄞 👩‍🚀")
        page.type('\'\nclear; echo -n "$X" | md5sum\n')
        shows(page, hashlib.md5(text.encode()).hexdigest())


def test_the_window_is_the_terminals_size(page: Page, pigeon: Pigeon) -> None:
    """A window that changes its size changes the terminal's."""
    with session_of(page, pigeon, "sizer"):
        page.resize(700, 500)
        page.until("/^[0-9]+ × [0-9]+$/.test(document.getElementById('size').textContent)")
        page.type("until [ $(tput cols) -lt 80 ]; do :; done; clear; stty size\n")
        page.until(f"{SCREEN}.includes(document.getElementById('size').textContent.split(' × ').reverse().join(' '))")


def test_questions_of_old_are_not_answered_again(page: Page, pigeon: Pigeon) -> None:
    """A reload replays what programs asked the terminal; its answers to the replay are not typed into the session."""
    with session_of(page, pigeon, "asker"):
        page.type("printf '\\033[6n\\033[c'; read -rs -d R; read -rs -d c; echo answ''ered\n")
        shows(page, "answered")
        page.type("clear; echo one; cat -v\n")
        shows(page, "one")
        page.reload()
        shows(page, "one")
        page.type("two\n")
        page.until(f"{SCREEN}.split('two').length > 2")
        assert "^[" not in page.evaluate(SCREEN)
        page.type("\x04")


def test_two_tabs_answer_once(browser: Browser, page: Page, pigeon: Pigeon) -> None:
    """A session that is open in two tabs gets one answer to a question about its terminal, from the tab in front."""
    question = "clear; printf '\\033[c'; read -rs -d c; read -rs -t 1 -N 1 REST; echo $((%d * 11)) rest=[${REST@Q}]\n"
    with session_of(page, pigeon, "twin"):
        second = browser.page()
        second.open(page.evaluate("location.href"))
        shows(second, "$")
        second.until("document.getElementById('screen').ariaBusy === 'false'")
        for number, tab in enumerate((second, page, second), 1):
            tab.to_front()
            tab.until("document.visibilityState === 'visible'")
            tab.type(question % number)
            shows(tab, f"{number * 11} rest=['']")
        second.close()


def test_a_session_ends_and_a_new_one_begins(page: Page, pigeon: Pigeon) -> None:
    """The end is said, what was printed stays, and a new session is one button away."""
    with session_of(page, pigeon, "ender"):
        page.type("echo last words\n")
        shows(page, "last words")
        click(page, "#end")
        state(page, "closed")
        page.until("!document.getElementById('notice').hidden")
        shows(page, "last words")
        assert page.evaluate("document.getElementById('end').disabled")
        click(page, "#notice button")
        state(page, "ready")
        page.until(f"!{SCREEN}.includes('last words') && {SCREEN}.includes('$')")


def test_a_full_house_is_a_queue(page: Page, pigeon: Pigeon) -> None:
    """The third of two sessions waits with its position in view, and starts when there is room."""
    with session_of(page, pigeon, "queuer"):
        first = page.evaluate("location.hash.slice(1)")
        click(page, "#new")
        page.until(f"location.hash.slice(1) !== '{first}'")
        state(page, "ready")
        second = page.evaluate("location.hash.slice(1)")
        click(page, "#new")
        page.until(f"location.hash.slice(1) !== '{second}'")
        state(page, "queued")
        page.until("document.getElementById('badge').innerText.includes('1st in the queue')")
        page.until("document.querySelector('#curtain h1').innerText === 'You are 1st in the queue'")
        click(page, "#new")
        page.until("document.getElementById('notice').innerText.includes('at most 3 sessions')")
        pigeon.run("close", first, "-u", "queuer")
        state(page, "ready")
        page.until("document.getElementById('curtain').hidden")
        page.evaluate(f"location.hash = '{second}'")
        page.until(f"document.getElementById('sessions').value === '{second}'")


def test_a_broken_connection_is_picked_up(page: Page, tmp_path: Path, python: Path) -> None:
    """What is printed while the server is away comes when it is back, once; so does what was typed."""
    pigeon = Pigeon(tmp_path / "state", PIGEON_PYTHON=str(python))
    with pigeon.background("up", "--roles", "worker,ticker") as rest:
        with pigeon.background("up", "--port", "0", "--roles", "gateway") as gateway:
            port = pigeon.presence(gateway).port
            enter(page, pigeon, "traveller")
            page.type("for i in 1 2 3 4 5 6; do sleep 0.5; echo line $i of 6; done\n")
            shows(page, "line 1 of 6")
            gateway.signal(signal.SIGKILL)
            page.until("document.getElementById('link').dataset.link === 'waiting'")
            page.type("echo typed while $((3 * 3)) away\n")
        with pigeon.background("up", "--port", str(port), "--roles", "gateway") as gateway:
            pigeon.presence(gateway)
            shows(page, "typed while 9 away")
            page.until("document.getElementById('link').dataset.link === 'live'")
            screen = page.evaluate(SCREEN)
            assert [screen.count(f"line {i} of 6") for i in range(1, 7)] == [1] * 6
            assert screen.count("typed while 9 away") == 1
            gateway.signal(signal.SIGINT)
            gateway.end()
        rest.signal(signal.SIGINT)
        rest.end()
    with pigeon.up():
        pass  # which ends what those left behind


def test_events_do_not_depend_on_how_the_bytes_are_cut(page: Page, pigeon: Pigeon) -> None:
    """The page's parser gives the same events for every cut of a stream."""
    page.open(address(pigeon, "walker").partition("?")[0])
    page.until("document.body.innerText.includes('pigeon open')")
    outcomes = page.evaluate("""import('/page/stream.js').then(({ EventParser }) => {
        const text = ': hi\\n\\nid: 5\\ndata: {}\\n\\n'
            + 'event: state\\r\\ndata: one\\r\\ndata:two é\\r\\n\\r\\ndata: open';
        const bytes = new TextEncoder().encode(text);
        const outcomes = new Set();
        for (let first = 0; first <= bytes.length; first++) {
            for (let second = first; second <= bytes.length; second++) {
                const parser = new EventParser();
                const pieces = [bytes.slice(0, first), bytes.slice(first, second), bytes.slice(second)];
                outcomes.add(JSON.stringify(pieces.flatMap((piece) => [...parser.feed(piece)])));
            }
        }
        return [...outcomes];
    })""")
    assert [json.loads(outcome) for outcome in outcomes] == [
        [{"type": "message", "data": "{}", "id": "5"}, {"type": "state", "data": "one\ntwo é", "id": ""}]
    ]


def test_nothing_of_one_session_is_drawn_in_the_next(page: Page, pigeon: Pigeon) -> None:
    """Whoever leaves a session that prints a flood sees the other one: what was read or written already is dropped."""
    page.open(address(pigeon, "walker").partition("?")[0])
    page.until("document.body.innerText.includes('pigeon open')")
    shown = page.evaluate("""import('/page/screen.js').then(async ({ Screen }) => {
        const element = document.body.appendChild(document.createElement('div'));
        const typed = [];
        const on = { input: (bytes) => typed.push(...bytes), resize() {}, title() {} };
        const screen = new Screen(element, on);
        const encoder = new TextEncoder();
        screen.write(encoder.encode('old '.repeat(100_000) + '\\x1b[31m\\x1b[?1049h'), false);
        screen.write(new Uint8Array([0x1b, 0x5d, 0x30, 0x3b, 0xe2, 0x82]), false); // a title and a character, begun
        await screen.clear();
        await new Promise((drawn) => screen.terminal.write(encoder.encode('new'), drawn));
        const { active } = screen.terminal.buffer;
        const lines = Array.from({ length: active.length }, (_, i) => active.getLine(i).translateToString(true));
        return [active.type, lines.join('')];
    })""")
    assert shown == ["normal", "new"]
    drawn = page.evaluate("""import('/page/stream.js').then(async ({ follow }) => {
        const message = (offset) => `id: ${offset + 1}\\ndata: {"offset":${offset},"data":"eA=="}\\n\\n`;
        window.fetch = async () => new Response(message(0) + message(1) + message(2));
        const leaving = new AbortController();
        const drawn = [];
        const data = (_, offset) => (drawn.push(offset), leaving.abort());
        await follow('s', { data, link() {} }, leaving.signal);
        return drawn;
    })""")
    assert drawn == [0]


def test_without_a_ticket_the_page_says_what_to_do(page: Page, pigeon: Pigeon) -> None:
    """A browser that nobody knows, or a used address, gets words and nothing else."""
    used = address(pigeon, "walker")
    page.open(used)
    page.until("document.getElementById('badge')")
    page.forget_cookies()
    page.open(used)
    page.until("document.body.innerText.includes('pigeon open')")
    close_all(pigeon, "walker")


def test_another_sites_page_gets_nothing(page: Page, pigeon: Pigeon) -> None:
    """A page of another origin in the same browser can neither read nor post, under either name of this machine."""
    with session_of(page, pigeon, "victim"), foreign_site() as port:
        own = page.evaluate("location.origin")
        session = page.evaluate("location.hash.slice(1)")
        attacks = {
            f"/terminal-get-status/{session}": "{credentials: 'include'}",
            "/": "{credentials: 'include'}",
            f"/terminal-cleanup-session/{session}": "{credentials: 'include', method: 'DELETE'}",
            "/terminal-create-session": "{credentials: 'include', method: 'POST', body: '{}', mode: 'no-cors'}",
        }
        for name in ("127.0.0.1", "localhost"):
            page.open(f"http://{name}:{port}/")
            page.until("document.title === 'elsewhere'")
            for path, options in attacks.items():
                read = f"fetch('{own}{path}', {options}).then((answer) => answer.text())"
                assert page.evaluate(f"{read}.catch(() => '')") == "", path
        listed = json.loads(pigeon.run("sessions", "-u", "victim", "--json").stdout)
        assert [(entry["sessionId"], entry["state"]) for entry in listed] == [(session, "ready")]


def test_a_link_from_another_site_opens_the_page(page: Page, pigeon: Pigeon) -> None:
    """Whoever clicks the printed address in a web page, a chat say, gets in all the same."""
    with foreign_site() as port:
        page.open(f"http://localhost:{port}/")
        page.until("document.title === 'elsewhere'")
        page.evaluate(f"location.href = {json.dumps(address(pigeon, 'clicker'))}")
        state(page, "ready")
    close_all(pigeon, "clicker")


@contextmanager
def foreign_site() -> Iterator[int]:
    """A web server of somebody else's on this machine; gives its port."""

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>elsewhere</title>")

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield server.server_address[1]
        server.shutdown()
        serving.join()
