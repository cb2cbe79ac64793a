"""Agents for the tests: real processes, over real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.agent.client import AGENT, AgentProcess, Terminal, agent


@pytest.fixture
def process(tmp_path: Path) -> Iterator[AgentProcess]:
    """An agent whose session is open."""
    with agent(tmp_path) as running:
        yield running


@pytest.fixture
def terminal(process: AgentProcess) -> Terminal:
    """An agent with an attachment and a control connection."""
    return Terminal(process)


@contextmanager
def altered(directory: Path, original: str, replacement: str) -> Iterator[AgentProcess]:
    """An agent whose source differs in one place: what the machine has, or a limit too large for a test."""
    source = AGENT.read_text()
    assert source.count(original) == 1
    script = directory / "agent.py"
    script.write_text(source.replace(original, replacement))
    running = AgentProcess(directory, script=script)
    try:
        running.open()
        yield running
    finally:
        running.stop()


@pytest.fixture
def sh_process(tmp_path: Path) -> Iterator[AgentProcess]:
    """An agent that finds no bash."""
    with altered(tmp_path, '"/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash"', '"/nowhere",') as running:
        yield running


@pytest.fixture
def small_scan_process(tmp_path: Path) -> Iterator[AgentProcess]:
    """An agent for which 300 files are too many to look through."""
    with altered(tmp_path, "MAX_SCANNED_FILES = 20_000", "MAX_SCANNED_FILES = 300") as running:
        yield running
