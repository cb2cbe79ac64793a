"""Agents for the tests: real processes, over real sockets."""

from __future__ import annotations

from collections.abc import Iterator
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


@pytest.fixture
def sh_process(tmp_path: Path) -> Iterator[AgentProcess]:
    """An agent that finds no bash."""
    script = tmp_path / "agent.py"
    script.write_text(AGENT.read_text().replace('"/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash"', '"/nowhere",'))
    running = AgentProcess(tmp_path, script=script)
    try:
        running.open()
        yield running
    finally:
        running.stop()
