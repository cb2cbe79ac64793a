"""Who runs on a state folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from infra.local.presence import FILE, AlreadyRunning, Presence, claim, find


def test_a_gateway_is_found_while_it_runs(tmp_path: Path) -> None:
    """Starting, listening, gone: each is told apart."""
    state = tmp_path / "state"
    assert find(state) is None
    with claim(state) as own:
        assert find(state) == Presence(None, None)
        own.announce(4321)
        assert find(state) == Presence(os.getpid(), 4321)
        own.announce(17)
        assert find(state) == Presence(os.getpid(), 17)
    assert find(state) is None


def test_there_is_one_gateway(tmp_path: Path) -> None:
    """A second one is refused and told which process holds the folder; the first one notices nothing."""
    with claim(tmp_path) as own:
        own.announce(4321)
        with pytest.raises(AlreadyRunning, match=f"process {os.getpid()}, port 4321"), claim(tmp_path):
            pass
        assert find(tmp_path) == Presence(os.getpid(), 4321)
    with claim(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": 1}', '{"pid": "x", "port": "y"}'])
def test_what_the_file_says_counts_only_while_it_is_locked(tmp_path: Path, text: str) -> None:
    """A file that a crash left behind leads nobody to a port that may be another program's by now."""
    (tmp_path / FILE).write_text('{"pid": 1, "port": 80}')
    assert find(tmp_path) is None
    with claim(tmp_path):
        (tmp_path / FILE).write_text(text)
        assert find(tmp_path) == Presence(None, None)
