"""What is built once and cached: the Kubernetes binary, the pause program, the images' root file systems."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.cluster.layout import SOURCE, ClusterFailed, cache_folder

BINARY_SOURCES = ("go.mod", "go.sum", "main.go")
PAUSE_SOURCE = SOURCE / "pause" / "pause.c"  # in a folder of its own, since Go refuses C beside it
SUITE = "bookworm"
PACKAGES = ("python3", "python3-pip", "procps", "ca-certificates")  # beside what every Debian has
BASE_SUITE = "trixie"  # its Python is 3.13; the libraries that the images pin no longer run on bookworm's 3.11
BASE_PACKAGES = ("python3-venv", "ca-certificates")
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*")
DEMOTE = '--customize-hook=find "$1" -xdev -type f -perm /6000 -exec chmod a-s {} +'  # no set-user-id program is needed
UPSTREAM_PIP = '--customize-hook=chroot "$1" python3 -m venv /usr/local'  # Debian's pip may not change apt's
VERSION_PACKAGES = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
NICE = ("nice", "-n", "10")  # a build of many minutes; whoever works on this machine goes first


def kube_binary() -> Path:
    """The one binary of all Kubernetes components, compiled if this version of it is not in the cache.

    Raises ClusterFailed where there is no Go or the compilation fails.
    """
    return _cached("kube", _digest(*(SOURCE / name for name in BINARY_SOURCES)), _compile_kube)


def pause_binary() -> Path:
    """The static program of the pause image. Raises ClusterFailed where it does not compile."""
    return _cached("pause", _digest(PAUSE_SOURCE), _compile_pause)


def root_filesystem() -> Path:
    """A tar archive of a small Debian with Python. Raises ClusterFailed where it cannot be made."""
    return _bootstrapped("rootfs.tar", SUITE, *_bootstrap_options(PACKAGES, DEMOTE))


def base_filesystem() -> Path:
    """A tar archive of a small Debian with Python and pip in /usr/local, where Python's official image has them.

    Raises ClusterFailed where it cannot be made.
    """
    return _bootstrapped("base.tar", BASE_SUITE, *_bootstrap_options(BASE_PACKAGES, UPSTREAM_PIP))


def _compile_kube(target: Path) -> None:
    if not shutil.which("go"):
        raise ClusterFailed(
            "compiling Kubernetes takes Go, the version in infra/cluster/go.mod or newer: https://go.dev/dl"
        )
    linked = " ".join(
        f"-X {package}.{name}={value}" for package in VERSION_PACKAGES for name, value in _version().items()
    )
    command = ("go", "build", "-trimpath", "-buildvcs=false", f"-ldflags=-s -w {linked}", "-o", str(target), ".")
    _run((*NICE, *command), cwd=SOURCE, env={**os.environ, "CGO_ENABLED": "0"})


def kubernetes_version() -> str:
    """The version that go.mod pins, with its "v"."""
    words = (SOURCE / "go.mod").read_text().split()
    return words[words.index("k8s.io/kubernetes") + 1]


def _version() -> dict[str, str]:
    """What upstream's build scripts link in, and the components tell whoever asks."""
    version = kubernetes_version()
    major, minor, _ = version.removeprefix("v").split(".")
    return {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}


def _compile_pause(target: Path) -> None:
    _run(("gcc", "-Os", "-s", "-static", "-Wall", "-Werror", "-o", str(target), str(PAUSE_SOURCE)))


def _bootstrapped(name: str, suite: str, *options: str) -> Path:
    def bootstrap(target: Path) -> None:
        _run((*NICE, "mmdebstrap", *options, suite, str(target)))

    return _cached(name, _hash(repr((suite, options)).encode()), bootstrap)


def _bootstrap_options(packages: tuple[str, ...], hook: str) -> tuple[str, ...]:
    excluded = (f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT)
    return ("--quiet", "--format=tar", "--variant=minbase", f"--include={','.join(packages)}", hook, *excluded)


def _cached(name: str, digest: str, make: Callable[[Path], None]) -> Path:
    """The file of that name and digest; made under another name and renamed, so that it is whole or missing."""
    folder = cache_folder() / digest
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    with _locked(folder / f"{name}.lock"):
        if not target.exists():
            unfinished = folder / f"{name}.unfinished"
            make(unfinished)
            unfinished.replace(target)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two builds at once would take twice as long each."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(*files: Path) -> str:
    return _hash(b"".join(file.read_bytes() for file in files))


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _run(command: tuple[str, ...], cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    try:
        subprocess.run(command, cwd=cwd, env=env, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ClusterFailed(f"could not build: {error}") from error
