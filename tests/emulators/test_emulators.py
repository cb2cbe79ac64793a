"""Emulators are found, or said to be missing, and never outlive their owner."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from infra import leash
from infra.emulators import DOCKER_SCRIPT, SDK_VARIABLES, EmulatorMissing, firestore_emulator, pubsub_emulator
from tests.waiting import until


async def test_a_running_emulator_is_used(firestore_host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FIRESTORE_EMULATOR_HOST comes first."""
    monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", firestore_host)
    async with firestore_emulator() as host:
        assert host == firestore_host


async def test_a_host_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is started behind the back of who said where to look."""
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", "127.0.0.1:1")
    monkeypatch.setattr("infra.emulators.ANSWER_SECONDS", 0.1)
    with pytest.raises(EmulatorMissing, match=r"PUBSUB_EMULATOR_HOST is 127\.0\.0\.1:1,"):
        async with pubsub_emulator():
            pass


async def test_a_missing_emulator_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without Java, SDK and Docker the message says what to install."""
    for name in ("PUBSUB_EMULATOR_HOST", "JAVA_HOME", "GOOGLE_CLOUD_SDK", "CLOUDSDK_ROOT", "CLOUDSDK_ROOT_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("infra.emulators.SDK_PLACES", ())
    with pytest.raises(
        EmulatorMissing, match="install Java and the Google Cloud CLI's google-cloud-cli-pubsub"
    ) as info:
        async with pubsub_emulator():
            pass
    assert "\n" not in str(info.value)


DOCKER = """#!/bin/sh
# Stands for docker: notes what it is told, publishes the port itself, and ends when its input does.
printf '%s\\n' "$@" > "$NOTE"
port=$(printf '%s\\n' "$@" | sed -n 's/^127.0.0.1:\\([0-9]*\\):.*/\\1/p')
"$PYTHON" -c "$SERVE" "$port" &
read -r _
kill $!
echo ended >> "$NOTE"
"""
SERVE = """
import http.server, sys
class Ok(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200), self.end_headers(), self.wfile.write(b"Ok")
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ok).serve_forever()
"""


@pytest.mark.parametrize("kind", ["pubsub", "firestore"])
async def test_docker_is_told_to_run_the_emulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    """Without Java: on the loopback only, with the rules, in a container that ends when we do. The program here only
    stands for docker: no engine has run these arguments."""
    programs, note, rules = tmp_path / "bin", tmp_path / "note", tmp_path / "some.rules"
    programs.mkdir()
    (programs / "docker").write_text(DOCKER)
    (programs / "docker").chmod(0o755)
    for program in ("sh", "sed"):
        (programs / program).symlink_to(shutil.which(program) or "")
    for name in ("PUBSUB_EMULATOR_HOST", "FIRESTORE_EMULATOR_HOST", "JAVA_HOME", *SDK_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PATH": programs, "NOTE": note, "PYTHON": sys.executable, "SERVE": SERVE}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("infra.emulators.SDK_PLACES", ())
    async with firestore_emulator(rules) if kind == "firestore" else pubsub_emulator() as host:
        port = host.rpartition(":")[2]
        told = note.read_text().splitlines()
    assert told[:6] == ["run", "--rm", "--init", "-i", "-p", f"127.0.0.1:{port}:{port}"]
    inside = told[told.index("sh") :]
    assert inside[:4] == ["sh", "-c", DOCKER_SCRIPT, "sh"]
    assert inside[4:9] == ["gcloud", "emulators", kind, "start", f"--host-port=0.0.0.0:{port}"]
    assert (f"{rules}:/firestore.rules:ro" in told) == (kind == "firestore")
    assert ("--rules=/firestore.rules" in inside) == (kind == "firestore")
    assert note.read_text().endswith("ended\n")


async def test_what_is_on_the_leash_dies_with_its_owner(tmp_path: Path) -> None:
    """Also when the owner is killed: the kernel closes its end of the pipe."""
    note = tmp_path / "pid"
    child = f"import os, pathlib, time; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(600)"
    owner = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, {leash.__file__!r}, sys.executable, '-c', {child!r}],"
        " stdin=subprocess.PIPE)\n"
        "time.sleep(600)\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", owner)

    async def started() -> int | None:
        return int(note.read_text()) if note.exists() and note.read_text() else None

    pid = await until(started, "the command runs")
    process.send_signal(signal.SIGKILL)
    await process.wait()

    async def gone() -> bool:
        return not _alive(pid)

    await until(gone, "the command is gone")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
