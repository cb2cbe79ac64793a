"""What a sandbox offers, and what a machine without isolation is told."""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

import pytest

from infra.local.bubblewrap import find_bwrap
from infra.local.sandbox_probe import NAMESPACES, WAY_OUT, advice
from tests.isolation.conftest import House

PYTHON = """
import json, os, pathlib, shutil, subprocess, sys
import ctypes, multiprocessing, sqlite3, ssl, venv, zoneinfo

def told(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

with multiprocessing.Pool(2) as pool:
    squares = pool.map(abs, [-1, -2])
certificates = ssl.create_default_context().cert_store_stats()["x509_ca"]
subprocess.run([sys.executable, "-m", "venv", "--without-pip", "/workspace/own"], check=True)
result = {
    "which": shutil.which("python3"),
    "pip": told("pip", "--version") if shutil.which("pip") else "pip",
    "own": told("/workspace/own/bin/python3", "-c", "print(6 * 7)"),
    "squares": squares,
    "user": told("id", "-un"),
    "home": str(pathlib.Path.home()),
    "environment": sorted(os.environ),
    "hostname": os.uname().nodename,
    "loopback": told("python3", "-c", "import socket; s = socket.create_server(('127.0.0.1', 0)); print('bound')"),
}
pathlib.Path("/workspace/result.json").write_text(json.dumps(result))
"""

NETWORK = """
import json, os, pathlib, socket
given = json.loads(pathlib.Path("/workspace/arguments.json").read_text())

def tried(family, address):
    with socket.socket(family) as sock:
        try:
            sock.connect(address)
        except OSError as error:
            return type(error).__name__
        return "connected"

own = socket.socket(socket.AF_UNIX)
own.bind("\\0own")
own.listen()
result = {
    "port": tried(socket.AF_INET, ("127.0.0.1", given["port"])),
    "abstract": tried(socket.AF_UNIX, "\\0" + given["abstract"]),
    "own abstract": tried(socket.AF_UNIX, "\\0own"),
    "pid": os.readlink("/proc/self/ns/pid"),
}
pathlib.Path("/workspace/result.json").write_text(json.dumps(result))
"""

REFUSED = """
import asyncio, pathlib
from infra.local.sandboxes import LocalSandboxes
from schemas.errors import SandboxFailed
from schemas.limits import Limits
try:
    print(asyncio.run(LocalSandboxes(pathlib.Path({root!r}), limits=Limits()).check_isolation()))
except SandboxFailed as refused:
    print("refused:", refused)
"""


def test_a_sandbox_has_a_whole_python(house: House, tmp_path: Path) -> None:
    """The standard library, pip, virtual environments, processes and the loopback work as anywhere."""
    script = tmp_path / "python.py"
    script.write_text(PYTHON)
    answer = house.run(script)
    result = answer["result"]
    assert result, answer
    assert result["which"] == str(house.state / "python" / "bin" / "python3")
    assert result["pip"].startswith("pip")
    assert (result["own"], result["squares"], result["loopback"]) == ("42", [1, 2], "bound")
    assert (result["user"], result["home"], result["hostname"]) == ("user", "/workspace", "sandbox")
    assert "SECRET_OF_THE_HOST" not in result["environment"]


def test_the_hosts_network_is_shared_when_asked_for(house: House, tmp_path: Path) -> None:
    """PIGEON_NETWORK=host gives user code the machine's network, and nothing else of it."""
    script = tmp_path / "network.py"
    script.write_text(NETWORK)
    abstract = f"pigeon-network-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0{abstract}")
        local.listen()
        answer = house.run(script, {"port": server.getsockname()[1], "abstract": abstract}, network="host")
    reached = answer["result"]
    assert reached, answer
    assert (reached["port"], reached["own abstract"]) == ("connected", "connected")
    assert reached["abstract"] == ("PermissionError" if scopes_abstract_sockets() else "connected")
    assert reached["pid"] != os.readlink("/proc/self/ns/pid")


def scopes_abstract_sockets() -> bool:
    """Whether this kernel's Landlock knows abstract Unix sockets (Linux 6.12)."""
    libc = ctypes.CDLL(None)
    return bool(libc.syscall(444, None, ctypes.c_size_t(0), 1) >= 6)


def test_a_machine_with_isolation_says_which(house: House) -> None:
    """The start of a stack tries one sandbox and tells what isolates sessions."""
    told = house.python("-c", REFUSED.format(root=str(house.state / "sandboxes"))).stdout
    assert told.startswith("bubblewrap ("), told


def test_a_machine_without_namespaces_refuses(plain_users_house: House) -> None:
    """Where namespaces are forbidden there is no session without isolation, but word of what to do."""
    house = plain_users_house
    script = REFUSED.format(root=str(house.state / "sandboxes"))
    jailed = [str(find_bwrap()), "--dev-bind", "/", "/", "--unshare-user", "--disable-userns", house.interpreter]
    done = house.python(
        "-c", f"import subprocess, sys; sys.exit(subprocess.run({[*jailed, '-c', script]!r}).returncode)"
    )
    assert done.stdout.startswith("refused: Sessions cannot be isolated on this machine"), done
    assert "user.max_user_namespaces" in done.stdout
    assert "PIGEON_UNSAFE_NO_SANDBOX=1" in done.stdout


@pytest.mark.parametrize(
    ("failure", "remedy"),
    [
        ("bwrap: Can't mount proc on /newroot/proc: Operation not permitted", "systempaths=unconfined"),
        ("bwrap: setting up uid map: Permission denied", "apparmor_restrict_unprivileged_userns"),
        ("bwrap: Can't find source path /root/x: Permission denied", "cannot be read by other users"),
        ("bwrap: No permissions to create a new namespace", NAMESPACES),
        ("no usable bubblewrap: install it", WAY_OUT),
    ],
)
def test_a_refusal_says_what_to_do(failure: str, remedy: str) -> None:
    """Every known cause has its own remedy, and every refusal names the way out."""
    assert remedy in advice(failure)
    assert WAY_OUT in advice(failure)
