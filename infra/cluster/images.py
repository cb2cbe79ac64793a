"""Container images assembled without a registry, as OCI archives that `ctr images import` reads."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import py_compile
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from infra.cluster import build
from infra.cluster.layout import PAUSE_IMAGE, SOURCE, TERMINAL_IMAGES, ClusterFailed, Layout

USER = 1_000
AGENT_SOURCE = SOURCE.parents[1] / "consumers" / "agent" / "agent.py"
AGENT = "opt/pigeon/agent/__main__.py"
COMPILED = "opt/pigeon/agent/__pycache__/__main__.cpython-311.pyc"  # Debian 12's Python
MODE_FILE, MODE_PROGRAM, MODE_FOLDER = 0o644, 0o755, 0o770
COPY_BYTES = 1 << 20

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
OCI = "application/vnd.oci.image"
TERMINAL_CONFIG = {
    "User": f"{USER}:{USER}",
    "WorkingDir": "/workspace",
    "Env": [
        "PATH=/workspace/.local/bin:/usr/local/bin:/usr/bin:/bin",
        "LANG=C.UTF-8",
        "PYTHONDONTWRITEBYTECODE=1",
    ],
    "Cmd": [
        *("python3", "-I", "-S", "/opt/pigeon/agent", "serve", "--socket", "@pigeon-agent"),
        *("--workspace", "/workspace", "--run-dir", "/run/pigeon"),
    ],
}


BASE_CONFIG = {
    "Env": ["PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
    "Cmd": ["python3"],
}


@dataclass(frozen=True, slots=True)
class Image:
    """An image of one or more tar layers, lowest first; `config` is the `config` object of the OCI image spec."""

    names: tuple[str, ...]
    layers: tuple[Path | bytes, ...]
    config: dict[str, Any] = field(default_factory=dict)

    def write(self, archive: Path) -> None:
        """Write the OCI archive. The layers are left uncompressed: it is read once, on this machine."""
        with tarfile.open(archive, "w") as tar:
            layers = [_add_blob(tar, layer, f"{OCI}.layer.v1.tar") for layer in self.layers]
            rootfs = {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]}
            config = {"architecture": ARCHITECTURE, "os": "linux", "config": self.config, "rootfs": rootfs}
            manifest: dict[str, Any] = {
                "schemaVersion": 2,
                "mediaType": f"{OCI}.manifest.v1+json",
                "config": _add_blob(tar, _json(config), f"{OCI}.config.v1+json"),
                "layers": layers,
            }
            described = _add_blob(tar, _json(manifest), manifest["mediaType"])
            named = [{**described, "annotations": {"io.containerd.image.name": name}} for name in self.names]
            _add_file(tar, "index.json", _json({"schemaVersion": 2, "manifests": named}))
            _add_file(tar, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))


def pause(name: str, program: Path) -> Image:
    """The image of a pod's first container."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        _add_file(tar, "pause", program.read_bytes(), MODE_PROGRAM)
    return Image((name,), (layer.getvalue(),), {"Entrypoint": ["/pause"], "User": "65535:65535"})


def terminal(names: tuple[str, ...], root_filesystem: Path) -> Image:
    """What a session runs: a small Debian with Python, the user, the workspace and the agent.

    It has the product image's paths, user and environment, but Debian's Python and none of its libraries.
    """
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        passwd, group = f"user:x:{USER}:{USER}::/workspace:/bin/bash\n", f"user:x:{USER}:\n"
        for name, line in (("etc/passwd", passwd), ("etc/group", group)):
            _add_file(tar, name, _member(root_filesystem, name) + line.encode())
        for folder in ("workspace", "run/pigeon"):
            _add_folder(tar, folder)
        _add_file(tar, AGENT, AGENT_SOURCE.read_bytes())
        if sys.version_info[:2] == (3, 11):  # another Python's code would be of no use to the image's
            _add_file(tar, COMPILED, _compiled(AGENT_SOURCE))
    return Image(names, (root_filesystem, layer.getvalue()), TERMINAL_CONFIG)


def base(name: str, root_filesystem: Path) -> Image:
    """What stands in for the official image of Python: its paths, but Debian's build and another release."""
    return Image((name,), (root_filesystem,), BASE_CONFIG)


def _compiled(source: Path) -> bytes:
    """Compiling the agent is more than half of its start, and a pod has a quarter of a core for it."""
    with tempfile.TemporaryDirectory() as folder:
        mode = py_compile.PycInvalidationMode.CHECKED_HASH
        made = Path(folder) / "pyc"
        py_compile.compile(str(source), str(made), f"/{AGENT}", doraise=True, invalidation_mode=mode)
        return made.read_bytes()


def write_all(layout: Layout) -> None:
    """Write the archives of both images for `load`, the agent as it is now."""
    layout.images.mkdir(parents=True, exist_ok=True)
    pause(PAUSE_IMAGE, build.pause_binary()).write(layout.images / "pause.tar")
    terminal(TERMINAL_IMAGES, build.root_filesystem()).write(layout.images / "terminal.tar")


def load(layout: Layout, snapshotter: str) -> None:
    """Give containerd, which runs, the archives that were written. Raises ClusterFailed if it refuses one."""
    for archive in sorted(layout.images.glob("*.tar")):
        load_archive(layout, snapshotter, archive)
        archive.unlink()


def load_archive(layout: Layout, snapshotter: str, archive: Path) -> None:
    """Give containerd, which runs, one archive of OCI's or Docker's kind. Raises ClusterFailed if it refuses it."""
    ctr = ("ctr", "--address", str(layout.containerd_socket), "--namespace", "k8s.io")
    command = (*ctr, "images", "import", "--snapshotter", snapshotter, str(archive))
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ClusterFailed(f"containerd refused {archive.name}: {done.stderr.strip()}")


def _member(archive: Path, name: str) -> bytes:
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"./{name}")
        return file.read() if file else b""


def _add_file(tar: tarfile.TarFile, name: str, data: bytes, mode: int = MODE_FILE) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), mode
    tar.addfile(info, io.BytesIO(data))


def _add_folder(tar: tarfile.TarFile, name: str) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.uid, info.gid = tarfile.DIRTYPE, MODE_FOLDER, USER, USER
    tar.addfile(info)


def _add_blob(tar: tarfile.TarFile, content: Path | bytes, media_type: str) -> dict[str, Any]:
    """Add the content under its digest; returns its descriptor."""
    if isinstance(content, bytes):
        return _add_stream(tar, io.BytesIO(content), len(content), media_type)
    with content.open("rb") as file:
        return _add_stream(tar, file, content.stat().st_size, media_type)


def _add_stream(tar: tarfile.TarFile, file: IO[bytes], size: int, media_type: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    for piece in _pieces(file):
        digest.update(piece)
    file.seek(0)
    info = tarfile.TarInfo(f"blobs/sha256/{digest.hexdigest()}")
    info.size = size
    tar.addfile(info, file)
    return {"mediaType": media_type, "digest": f"sha256:{digest.hexdigest()}", "size": size}


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(COPY_BYTES), b"")


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
