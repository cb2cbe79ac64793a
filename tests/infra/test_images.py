"""What the images promise, read from their files: no container engine is needed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from consumers.agent import agent
from infra.adapters.kube_pod import AGENT, RUN_DIR, WORKSPACE, pod
from infra.adapters.kube_settings import KubeSettings
from schemas.ports import SandboxSpec

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "infra" / "images"
TERMINAL, WORKER = IMAGES / "python-terminal", IMAGES / "worker"
BASE = re.compile(r"python:3\.12\.\d+-slim-bookworm(@sha256:[0-9a-f]{64})?")
REQUIREMENT = re.compile(r"^([a-z0-9][a-z0-9.-]*)==([^ ;\\]+)", re.MULTILINE)


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, its continued lines joined."""

    verb: str
    rest: str

    @property
    def words(self) -> list[str]:
        """Its arguments without options."""
        return [word for word in self.rest.split() if not word.startswith("--")]


def instructions(image: Path) -> list[Instruction]:
    """The instructions of an image's Dockerfile."""
    text = "\n".join(line for line in (image / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    lines = [line.split(None, 1) for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [Instruction(verb, " ".join(rest.split())) for verb, rest in lines]


def of(image: Path, verb: str) -> list[Instruction]:
    """Its instructions of one kind."""
    return [each for each in instructions(image) if each.verb == verb]


def environment(image: Path) -> dict[str, str]:
    """The variables that the image sets."""
    pairs = (word.partition("=") for each in of(image, "ENV") for word in each.words)
    return {name: value for name, _, value in pairs}


def locked(lock: Path) -> dict[str, str]:
    """The version of each package that a lock file pins."""
    return dict(REQUIREMENT.findall(lock.read_text()))


images = pytest.mark.parametrize("image", [TERMINAL, WORKER], ids=lambda path: path.name)


@images
def test_every_stage_starts_from_the_same_pinned_base(image: Path) -> None:
    """A release of Python and of Debian, not whatever is newest on the day of the build."""
    bases = {each.words[0] for other in (TERMINAL, WORKER) for each in of(other, "FROM")}
    assert len(bases) == 1
    assert all(BASE.fullmatch(each.words[0]) for each in of(image, "FROM"))


@images
def test_it_does_not_run_as_root(image: Path) -> None:
    """By number: Kubernetes cannot tell that a name is not root's."""
    (user,) = of(image, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user.rest)
    assert instructions(image).index(user) > instructions(image).index(of(image, "COPY")[-1])


@images
def test_nothing_is_downloaded_but_locked_wheels(image: Path) -> None:
    """No ADD, no curl, no apt: what an image is made of is in the repository or in a lock file with hashes."""
    assert of(image, "ADD") == []
    for each in of(image, "RUN"):
        assert not re.search(r"\b(curl|wget|git|apt|apt-get|ssh)\b", each.rest)
        for install in re.findall(r"pip install [^&]*", each.rest):
            assert "--require-hashes --only-binary=:all:" in install or "--no-index --no-deps" in install


@images
def test_no_secret_is_baked_in(image: Path) -> None:
    """Arguments and variables of a build stay readable in its image."""
    assert of(image, "ARG") == []
    assert not re.search(r"secret|token|password|credential|key", " ".join(environment(image)), re.IGNORECASE)
    assert not any("." in each.words[:-1] or ".." in each.rest.split("/") for each in of(image, "COPY"))


@images
def test_what_it_copies_is_there_and_let_through(image: Path) -> None:
    """In the repository, and past .dockerignore, which lets nothing else through."""
    ignored, *let_through = (line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] in "*!")
    assert ignored == "*"
    allowed = {line.removeprefix("!") for line in let_through if line.startswith("!")}
    for each in of(image, "COPY"):
        if "--from=" not in each.rest:
            for source in each.words[:-1]:
                assert (ROOT / source).exists()
                assert source.split("/")[0] in allowed


@pytest.mark.parametrize("lock", [TERMINAL / "requirements.lock", ROOT / "requirements-gcp.lock"], ids=lambda p: p.name)
def test_locks_have_hashes_and_no_addresses(lock: Path) -> None:
    """Each package is one version with its hashes, from whatever index the builder uses."""
    text = lock.read_text()
    blocks = re.split(r"\n(?=[a-z0-9])", text.strip())
    assert all("==" in block and "--hash=sha256:" in block for block in blocks)
    assert "://" not in text


def test_sessions_can_import_what_is_promised() -> None:
    """numpy, pandas, matplotlib, requests and IPython are there, in versions that the lock agrees with."""
    wanted = (TERMINAL / "requirements.in").read_text()
    names = re.findall(r"^([a-z]+)>=", wanted, re.MULTILINE)
    assert names == ["ipython", "matplotlib", "numpy", "pandas", "requests"]
    assert set(names) <= set(locked(TERMINAL / "requirements.lock"))


def test_a_session_starts_the_agent_as_the_pod_does() -> None:
    """The image has the agent where pods look for it, and starts it with the same words."""
    spec = SandboxSpec("s1", "s1", 1 << 28, 1 << 28, processes=128, file_bytes=1 << 28, lifetime_seconds=60)
    container = pod(spec, KubeSettings())["spec"]["containers"][0]
    (start,) = of(TERMINAL, "CMD")
    words = json.loads(start.rest)
    assert words == container["command"][: len(words)]
    assert [f"{AGENT}/__main__.py" in each.words for each in of(TERMINAL, "COPY")] == [False, True]
    assert of(TERMINAL, "COPY")[-1].words[0] == str(Path(agent.__file__).relative_to(ROOT))
    assert agent._work(words[words.index("serve") :]) is not None  # the agent understands its options


def test_any_user_id_can_use_the_image() -> None:
    """A pod's user may be a number of its own: what it writes goes to the workspace, /tmp or the run directory."""
    made = " ".join(each.rest for each in of(TERMINAL, "RUN"))
    assert f"install -d -o 1000 -g 1000 -m 0770 {WORKSPACE} {RUN_DIR}" in made
    variables = environment(TERMINAL)
    assert all(variables[name].startswith("/tmp/") for name in ("MPLCONFIGDIR", "IPYTHONDIR"))
    assert variables["PATH"].split(":")[0] == f"{WORKSPACE}/.local/bin"  # where pip puts programs without root
    assert "PIP_USER" not in variables  # it would break pip in a virtual environment
    assert of(TERMINAL, "WORKDIR")[0].rest == WORKSPACE


def test_whoever_builds_it_can_be_read_by_its_user() -> None:
    """A checkout made under umask 077 has files that only their owner reads; a copy in an image is root's."""
    *_, copied = (index for index, each in enumerate(instructions(TERMINAL)) if each.verb == "COPY")
    assert instructions(TERMINAL)[copied + 1].rest.endswith("chmod -R a+rX /opt/pigeon")


@images
def test_no_program_changes_its_user(image: Path) -> None:
    """The base has su, mount and others, and so has every stage that starts from it: the last is what counts."""
    *_, last = (index for index, each in enumerate(instructions(image)) if each.verb == "FROM")
    made = " ".join(each.rest for each in instructions(image)[last:] if each.verb == "RUN")
    assert "find / -xdev -type f -perm /6000 -exec chmod a-s {} +" in made


def test_no_build_tools_are_left() -> None:
    """The worker's environment is copied without the tools that made it; the terminal's base has no compiler."""
    stages = [index for index, each in enumerate(instructions(WORKER)) if each.verb == "FROM"]
    assert len(stages) == 2
    last = instructions(WORKER)[stages[-1] :]
    assert [each.verb for each in last] == ["FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "CMD"]
    assert "pip uninstall --yes hatchling pip" in of(WORKER, "RUN")[-2].rest
    assert "build-essential" not in (TERMINAL / "Dockerfile").read_text()


def test_the_worker_image_has_every_package_that_is_locked_for_it() -> None:
    """Google's clients, Kubernetes' client and what builds the wheel: nothing is resolved at build time."""
    assert {"google-cloud-pubsub", "google-cloud-firestore", "kubernetes", "aiohttp", "hatchling"} <= set(
        locked(ROOT / "requirements-gcp.lock")
    )
    assert json.loads(of(WORKER, "CMD")[0].rest) == ["pigeon", "worker"]
