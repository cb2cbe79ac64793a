"""Building the Dockerfiles with buildah where no registry is: each stage starts from a base that is made here.

buildah and what it starts run as root in a chroot, with the machine's network: it takes no daemon, no network namespace
and no kernel feature that a cluster does not take anyway. Its store is its own; nothing else on the machine sees it.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from ssl import get_default_verify_paths

from infra.cluster import build, images, lifecycle, machine
from infra.cluster.layout import ROOT, ClusterFailed, Layout

REGISTRY = "docker.io/library/"
DOCKERFILE = ROOT / "infra" / "images" / "python-terminal" / "Dockerfile"
ISOLATION = "--isolation=chroot"
SESSION_IMAGE = "pigeon/python-terminal"
HOME = "/root"  # of the build, where pip looks for its configuration; what is mounted leaves no trace in a layer
PIP_CONFIG = Path(".config") / "pip" / "pip.conf"
PIP_OPTIONS = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "default-timeout")
TAG = "built"
BUILD_SECONDS = 1_800.0  # of one command; minutes, where the machine is not busy


class Builder:
    """A store of images in `folder`, which is made; a build has the machine's options of pip while it lasts."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self.home = folder / "home"  # of the build's root
        self._command = ("buildah", "--root", str(folder / "store"), "--runroot", str(folder / "run"))

    def build_all(self) -> None:
        """Build both images with `make images`, tagged TAG. Raises ClusterFailed, with the end of the log."""
        self._add_base()
        write_pip_configuration(self.home)
        options = (ISOLATION, "--pull-never", "--volume", f"{self.home}:{HOME}:ro")
        variables = (f"BUILDER={shlex.join(self._command)}", f"TAG={TAG}", f"BUILD_OPTIONS={shlex.join(options)}")
        _run_alone(*build.NICE, "make", "--directory", str(ROOT), "images", *variables)

    def run(self, image: str, *words: str, user: str = "") -> str:
        """What a command prints in a container of an image, as the image's user or another. Raises ClusterFailed."""
        with self._container(image) as container:
            as_user = ("--user", user) if user else ()
            return self._buildah("run", ISOLATION, *as_user, container, "--", *words)

    def export(self, image: str, archive: Path) -> None:
        """Write a Docker archive, its layers uncompressed, that names the image as `image` in Docker's registry."""
        self._buildah("push", "--quiet", _built(image), f"docker-archive:{archive}:docker.io/{image}:{TAG}")

    def remove(self) -> None:
        """Take the store away."""
        shutil.rmtree(self._folder)

    def _add_base(self) -> None:
        archive = self._folder / "base.tar"
        images.base(base_name(), build.base_filesystem()).write(archive)
        found = self._buildah("pull", "--quiet", f"oci-archive:{archive}").strip()
        self._buildah("tag", found, base_name())
        archive.unlink()

    @contextmanager
    def _container(self, image: str) -> Iterator[str]:
        name = self._buildah("from", "--pull-never", _built(image)).strip()
        try:
            yield name
        finally:
            self._buildah("rm", name)

    def _buildah(self, *words: str) -> str:
        return _run_alone(*self._command, *words)


def _built(image: str) -> str:
    return f"localhost/{image}:{TAG}"


def build_and_load(layout: Layout) -> None:
    """Give a cluster that runs the session's image as its Dockerfile makes it, tagged TAG. Raises ClusterFailed."""
    if not lifecycle.is_ready(layout):
        raise ClusterFailed("no cluster runs here")
    machine.install()
    with tempfile.TemporaryDirectory(prefix="pigeon-images-") as folder:
        builder, archive = Builder(Path(folder) / "builder"), Path(folder) / "image.tar"
        builder.build_all()
        builder.export(SESSION_IMAGE, archive)
        lifecycle.load_archive(layout, archive)


def base_name() -> str:
    """What the Dockerfiles start from, by its full name."""
    match = re.search(r"^FROM (\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    assert match
    return REGISTRY + match[1]


def write_pip_configuration(home: Path) -> None:
    """Write the index that this machine's pip uses, and the certificates it trusts, for a build whose home this is."""
    told = _pip_options()
    kept = {name: value for name, value in told.items() if name in PIP_OPTIONS}
    certificates = told.get("cert") or get_default_verify_paths().cafile
    file = home / PIP_CONFIG
    file.parent.mkdir(parents=True, mode=0o700)
    if certificates:
        shutil.copy(certificates, home / "certificates.pem")
        kept["cert"] = f"{HOME}/certificates.pem"
    file.write_text("".join(("[global]\n", *(f"{name} = {value}\n" for name, value in kept.items()))))


def _pip_options() -> dict[str, str]:
    """pip's options of this machine, from its files and its environment, which wins; without their sections."""
    lines = _run(sys.executable, "-m", "pip", "config", "list").splitlines()
    pairs = (line.partition("=") for line in sorted(lines, key=lambda line: line.startswith(":env:")))
    return {name.rpartition(".")[2]: " ".join(str(ast.literal_eval(value)).split()) for name, _, value in pairs}


def _run_alone(*words: str) -> str:
    """Nothing that a command mounts or starts outlives it, however it ends: the store can always be removed."""
    return _run(*lifecycle.NAMESPACES, *words)


def _run(*words: str) -> str:
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=BUILD_SECONDS)
    if done.returncode:
        log = (done.stdout + done.stderr).splitlines()[-40:]
        raise ClusterFailed("\n".join((f"{shlex.join(words)} failed:", *log)))
    return done.stdout
