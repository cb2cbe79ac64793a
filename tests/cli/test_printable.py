"""What the command says by itself never steers the terminal it is said on."""

from __future__ import annotations

import json

import pytest

from infra.cli import fail
from infra.cli.common import describe, print_sessions
from infra.cli.printable import printable
from infra.cli.run import command_status
from infra.cli.tail import tell_gap
from schemas.errors import AgentRefused
from schemas.http import CommandStatus, SessionStatus, StreamedGap
from tests.cli.test_client import command, session

HOSTILE = "it ended: \x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\r\nno\u202e\udc80"


@pytest.mark.parametrize("text", ["The sandbox is gone. Überall – ✓", "", "'a' [b]"])
def test_plain_words_stay_as_they_are(text: str) -> None:
    """Every script, and every sign that takes room on the line."""
    assert printable(text) == text


def test_no_message_carries_a_sequence_of_a_sandbox(capsys: pytest.CaptureFixture[str]) -> None:
    """Lists, gaps, ends and errors: one line each, and nothing in it that a terminal obeys."""
    status = SessionStatus.model_validate_json(json.dumps(session(0) | {"reason": HOSTILE.replace("\udc80", "")}))
    lost = CommandStatus.model_validate_json(json.dumps(command(1, "lost")))
    assert print_sessions([status], ended=True, as_json=False) == 0
    tell_gap(StreamedGap(offset=0, length=1, reason=HOSTILE))
    command_status(lost.model_copy(update={"reason": HOSTILE}))
    with pytest.raises(SystemExit):
        fail(AgentRefused("not_found", HOSTILE))
    printed = capsys.readouterr()
    lines = [*printed.out.splitlines(), *printed.err.splitlines(), describe(status)]
    assert len(lines) == 5
    for line in lines:
        assert "it ended" in line
        assert line.isprintable()
