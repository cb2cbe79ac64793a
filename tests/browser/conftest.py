"""A browser in front of a running stack."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.chromium import Browser, Page, chromium, find_chromium
from tests.cli.pigeon import Pigeon


@pytest.fixture(scope="session")
def pigeon(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Iterator[Pigeon]:
    """`pigeon` on a running stack with room for two sessions."""
    limits = '{"capacity": 2, "pool_size": 0, "sessions_per_user": 3}'
    command = Pigeon(
        tmp_path_factory.mktemp("state"), PIGEON_PYTHON=str(python), PIGEON_LIMITS=limits, PIGEON_TICK_SECONDS="0.5"
    )
    with command.up():
        yield command


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests; on a laptop without one they are skipped, on a build machine they fail."""
    executable = find_chromium()
    if executable is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium on this build machine")
        pytest.skip("no Chromium here; PIGEON_CHROMIUM names one")
    with chromium(executable, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A new tab of a browser that nobody knows yet."""
    browser.forget()
    tab = browser.page()
    yield tab
    tab.close()
