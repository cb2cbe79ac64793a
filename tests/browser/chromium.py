"""A real browser, driven by the Chrome DevTools Protocol over its websocket."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
START_SECONDS = 60.0
PATIENCE = 60.0  # seconds for what a page is expected to show
FLAGS = (
    "--headless",
    "--no-sandbox",  # it runs as root on build machines; it sees our own page only
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
)


def find_chromium() -> str | None:
    """The browser on this machine, or None. PIGEON_CHROMIUM names another."""
    return os.environ.get("PIGEON_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium(executable: str, profile: Path) -> Iterator[Browser]:
    """A headless browser with a new profile, until the context ends."""
    command = [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        browser = Browser(_endpoint(process, profile))
        try:
            yield browser
        finally:
            browser.close()
        process.wait(START_SECONDS)
    finally:
        process.kill()
        process.wait()


def _endpoint(process: subprocess.Popen[bytes], profile: Path) -> str:
    """The browser's websocket, which it writes into its profile once it listens."""
    file = profile / "DevToolsActivePort"
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        if file.exists() and len(lines := file.read_text().splitlines()) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        time.sleep(0.02)  # another program's file: there is nothing to await
    raise AssertionError(f"the browser did not start: {process.poll()}")


class Browser:
    """One connection for all pages; each page is a session on it."""

    def __init__(self, endpoint: str) -> None:
        self._socket = websocket.create_connection(endpoint, timeout=START_SECONDS)
        self._last = 0

    def page(self) -> Page:
        """A new tab that shares the cookies of the others."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        return Page(self, session, target)

    def forget(self) -> None:
        """Forget who this browser is."""
        self.call("Storage.clearCookies", {})

    def call(self, method: str, parameters: dict[str, Any], session: str = "") -> dict[str, Any]:
        """Call a method and return its result; events that come meanwhile are dropped."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        self._socket.send(json.dumps({**message, "sessionId": session} if session else message))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise DevToolsError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def close(self) -> None:
        """End the browser and all of its processes."""
        self.call("Browser.close", {})
        self._socket.close()


class DevToolsError(Exception):
    """The browser refused a call, or the page went away during it."""


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser = browser
        self._session = session
        self._target = target

    def close(self) -> None:
        """Close the tab."""
        self._browser.call("Target.closeTarget", {"targetId": self._target})

    def to_front(self) -> None:
        """Choose this tab."""
        self.call("Page.bringToFront")

    def forget_cookies(self) -> None:
        """Forget who this browser is."""
        self._browser.forget()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol on this tab."""
        return self._browser.call(method, parameters, self._session)

    def open(self, url: str) -> None:
        """Go there, as if the address had been typed."""
        result = self.call("Page.navigate", url=url)
        assert not result.get("errorText"), f"{url}: {result['errorText']}"

    def reload(self) -> None:
        """Reload, as F5 does."""
        self.call("Page.reload")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise DevToolsError(json.dumps(result["exceptionDetails"])[:2000])
        return result["result"].get("value")

    def until(self, expression: str, patience: float = PATIENCE) -> None:
        """Wait in the page until the expression is true. Survives navigations."""
        watch = f"""new Promise((resolve) => {{
            const until = Date.now() + 1000;
            const look = () => {{
                let value = false;
                try {{ value = Boolean({expression}); }} catch {{}}
                if (value || Date.now() > until) resolve(value); else setTimeout(look, 20);
            }};
            look();
        }})"""
        until = time.monotonic() + patience
        while time.monotonic() < until:
            try:
                if self.evaluate(watch):
                    return
            except DevToolsError:
                continue  # the page was replaced while it was looked at
        raise AssertionError(f"{patience:g} s in vain for {expression}; the page says:\n{self.text()}")

    def text(self) -> str:
        """What the page shows as text."""
        return str(self.evaluate("document.body.innerText"))

    def type(self, text: str) -> None:
        """Type on the keyboard; a line end is the Enter key."""
        for character in text:
            if character == "\n":
                for kind in ("rawKeyDown", "char", "keyUp"):
                    self.call("Input.dispatchKeyEvent", type=kind, key="Enter", text="\r", windowsVirtualKeyCode=13)
            else:
                self.call("Input.dispatchKeyEvent", type="keyDown", key=character, text=character)
                self.call("Input.dispatchKeyEvent", type="keyUp", key=character)

    def insert(self, text: str) -> None:
        """Insert text as an input method or an emoji picker does."""
        self.call("Input.insertText", text=text)

    def resize(self, width: int, height: int) -> None:
        """Give the window another size, in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, path: Path) -> None:
        """Write what the page looks like as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
