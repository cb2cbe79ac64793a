"""Both images as buildah makes them of their Dockerfiles, on a base that stands in for the official one of Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.cluster import lifecycle
from infra.cluster.builder import HOME, PIP_CONFIG, TAG, Builder
from infra.cluster.layout import Layout
from tests.cluster.conftest import missing
from tests.cluster.deployment import Deployment
from tests.cluster.stacks import do, guest, whole_stack
from tests.infra.test_images import ROOT, TERMINAL, WORKER, environment, locked, of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_800)]  # minutes for the build, more where others build as well

IMAGES = {"pigeon/python-terminal": TERMINAL, "pigeon/worker": WORKER}
SESSION, DAEMON = IMAGES
LIBRARIES = ("numpy", "pandas", "matplotlib", "requests", "IPython")
UNPACKED_BYTES = 512 << 20  # a new node waits while it pulls; the base is a quarter of it
PATIENCE = 180.0  # seconds; a session has a quarter of a core for its imports, and files that were never read

both = pytest.mark.parametrize("image", IMAGES)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """A store that has both images."""
    if os.geteuid() != 0:
        missing("images are built in a chroot here, as root")
    for program in ("buildah", "mmdebstrap", "make"):
        if not shutil.which(program):
            missing(f"no {program}: `make cluster` installs what building images takes")
    made = Builder(tmp_path_factory.mktemp("images") / "builder")
    try:
        made.build_all()
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def archives(builder: Builder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Each image in a file, its layers uncompressed."""
    folder = tmp_path_factory.mktemp("archives")
    found = {image: folder / f"{Path(image).name}.tar" for image in IMAGES}
    for image, archive in found.items():
        builder.export(image, archive)
    yield found
    shutil.rmtree(folder)


def configuration(archive: Path) -> dict[str, Any]:
    """What an image says to whoever starts it."""
    with tarfile.open(archive) as tar:
        (manifest,) = json.load(member(tar, "manifest.json"))
        found: dict[str, Any] = json.load(member(tar, manifest["Config"]))["config"]
    return found


def layers(archive: Path) -> list[list[tarfile.TarInfo]]:
    """What each of its layers holds, lowest first."""
    with tarfile.open(archive) as tar:
        (manifest,) = json.load(member(tar, "manifest.json"))
        return [tarfile.open(fileobj=member(tar, name)).getmembers() for name in manifest["Layers"]]


def member(tar: tarfile.TarFile, name: str) -> Any:
    file = tar.extractfile(name)
    assert file
    return file


def contains(file: Path, text: str) -> bool:
    """Whether the bytes of this text are anywhere in it."""
    command = ("grep", "--quiet", "--fixed-strings", "--text", "-e", text, str(file))
    return subprocess.run(command, check=False).returncode == 0


@both
def test_it_says_what_its_dockerfile_says(image: str, archives: dict[str, Path]) -> None:
    """The user by number, the command, the folder and every variable."""
    dockerfile, found = IMAGES[image], configuration(archives[image])
    assert found["User"] == of(dockerfile, "USER")[0].rest
    assert found["Cmd"] == json.loads(of(dockerfile, "CMD")[0].rest)
    assert found["WorkingDir"] == of(dockerfile, "WORKDIR")[-1].rest
    variables = dict(each.split("=", 1) for each in found["Env"])
    assert variables.items() >= environment(dockerfile).items()
    assert not any(name.startswith("PIP_") for name in variables.keys() - environment(dockerfile).keys())
    assert not found.get("Entrypoint")


def test_the_base_has_programs_that_change_their_user(archives: dict[str, Path]) -> None:
    """Else the next test would prove nothing."""
    lowest, *_ = layers(archives[DAEMON])
    assert any(each.isfile() and each.mode & 0o6000 for each in lowest)


@both
def test_no_program_changes_its_user(image: str, builder: Builder) -> None:
    """Looked for as root, who sees every folder."""
    words = ("find", "/", "-xdev", "-type", "f", "-perm", "/6000")
    assert builder.run(image, *words, user="0:0") == ""


@both
def test_nothing_of_the_builders_is_left_in_it(image: str, builder: Builder, archives: dict[str, Path]) -> None:
    """Neither the index that pip was told of, which may have a password in its address, nor a file in root's home."""
    told = (builder.home / PIP_CONFIG).read_text().splitlines()
    values = [line.partition(" = ")[2] for line in told if " = " in line]
    assert contains(archives[image], "opt/pigeon/")  # what is in a layer is found
    for text in (f"{HOME}/certificates.pem", *(value for value in values if "://" in value)):
        assert not contains(archives[image], text)
    names = [each.name for layer in layers(archives[image])[1:] for each in layer]
    assert not [name for name in names if re.match(r"(root|tmp|var/tmp|home)/.|.*pip\.conf$", name)]


@both
def test_a_node_has_it_soon(image: str, archives: dict[str, Path]) -> None:
    """A new node pulls it before its first session."""
    assert archives[image].stat().st_size < UNPACKED_BYTES


def test_sessions_have_the_libraries_that_are_pinned(builder: Builder) -> None:
    """As the user of a session, from the versions of the lock file."""
    script = f"""if True:
        import json, os
        from importlib.metadata import version
        for name in {LIBRARIES}: __import__(name)
        print(json.dumps([os.getuid(), os.getgid(), {{name.lower(): version(name) for name in {LIBRARIES}}}]))
    """
    user, group, versions = json.loads(builder.run(SESSION, "python3", "-c", script))
    assert (user, group) == (1000, 1000)
    assert versions.items() <= locked(TERMINAL / "requirements.lock").items()


def test_a_session_draws_without_a_screen(builder: Builder) -> None:
    """Matplotlib finds its back end, and a place for its cache that is not the image's."""
    script = "import matplotlib.pyplot as p; p.plot([1, 2]); p.savefig('a.png'); print(open('a.png', 'rb').read(4))"
    assert builder.run(SESSION, "python3", "-c", script).strip() == r"b'\x89PNG'"


def test_the_agent_is_compiled_for_the_python_that_runs_it(builder: Builder) -> None:
    """Python says which file it has loaded the agent from."""
    script = "python3 -I -S -v /opt/pigeon/agent --help 2>&1 | grep -c '__pycache__/__main__.cpython-.*pyc matches'"
    assert builder.run(SESSION, "sh", "-c", script).strip() == "1"


def test_sessions_may_write_to_their_folders_only(builder: Builder) -> None:
    """The image's user owns the workspace and nothing that a later session would run."""
    script = (
        "find / -xdev \\( -type d -o -type f \\) -writable -not -path '/proc/*' -not -path '/dev/*' 2>/dev/null; true"
    )
    places = set(builder.run(SESSION, "sh", "-c", script).split())
    assert {"/workspace", "/run/pigeon", "/tmp"} <= places
    assert not [place for place in places if place.startswith(("/usr", "/opt", "/etc", "/bin", "/lib"))]


def test_the_worker_starts_as_its_user(builder: Builder) -> None:
    """The command of the image is found, and says what it would do."""
    assert builder.run(DAEMON, "id", "-u").strip() == "10001"
    assert "Usage: pigeon worker" in builder.run(DAEMON, "pigeon", "worker", "--help")


def test_the_worker_has_what_it_imports_and_no_installer(builder: Builder) -> None:
    """Every adapter of the cloud, Google's clients and the entry points of the functions."""
    modules = (
        *("google.cloud.pubsub_v1", "google.cloud.firestore", "kubernetes", "functions_framework", "cloudevents"),
        *("infra.adapters.pubsub", "infra.adapters.firestore", "infra.adapters.kube", "infra.wiring"),
        *("consumers.worker", "producers.routes"),
    )
    script = f"""if True:
        import json, importlib, importlib.util
        from importlib.metadata import distributions
        for name in {modules}: importlib.import_module(name)
        assert not any(importlib.util.find_spec(name) for name in ("pip", "hatchling"))
        print(json.dumps({{each.name.lower().replace("_", "-"): each.version for each in distributions()}}))
    """
    versions = json.loads(builder.run(DAEMON, "python3", "-c", script))
    pinned = locked(ROOT / "requirements-gcp.lock")
    assert versions.pop("pigeon-terminal")
    assert versions.items() <= pinned.items()


async def test_a_session_runs_on_the_image_that_was_built(
    kubeconfig: Path, own: Layout, archives: dict[str, Path], deployment: Deployment, tmp_path: Path
) -> None:
    """From the HTTP functions to a pod and back, with the Dockerfile's product in the pod."""
    if kubeconfig != own.kubeconfig:
        pytest.skip("the nodes of another cluster cannot be given an image by hand")
    lifecycle.load_archive(own, archives[SESSION])
    image = f"docker.io/{SESSION}:{TAG}"
    built = replace(deployment, environment={**deployment.environment, "PIGEON_KUBE_IMAGE": image})
    async with whole_stack(built, tmp_path) as stack:
        await stack.start()
        async with guest(stack, built, "alice") as alice:
            session = await alice.ready()
            assert built.pod(session)["status"]["containerStatuses"][0]["image"] == image
            script = f"import {', '.join(LIBRARIES)}; print(int(numpy.arange(10).sum()))"
            assert await do(alice, session, f'python3 -c "{script}"', PATIENCE) == (0, b"45\r\n")
