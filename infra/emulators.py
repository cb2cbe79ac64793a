"""Google's emulators of Pub/Sub and Firestore: those that run already, or started here for as long as we need them.

Looked for in this order: PUBSUB_EMULATOR_HOST and FIRESTORE_EMULATOR_HOST, the Google Cloud SDK's jars with Java,
Docker. Java is started directly, since gcloud's wrappers leave it behind when they are ended.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from infra import leash
from schemas.errors import Unavailable

START_SECONDS = 60.0  # a loaded machine; 1 to 3 otherwise
ANSWER_SECONDS = 5.0  # of one that is said to run already
END_SECONDS = 10.0
LOOK_SECONDS = 0.05
TRIES = 3  # another program may take the port that was free
LOG_TAIL_BYTES = 2_000

JAVA_OPTIONS = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xmx512m", "-Duser.language=en")
IMAGE = "google/cloud-sdk:emulators"
DOCKER_SCRIPT = '"$@" & read -r _'  # the container ends when its standard input does
SDK_VARIABLES = ("GOOGLE_CLOUD_SDK", "CLOUDSDK_ROOT", "CLOUDSDK_ROOT_DIR")
SDK_PLACES = (
    "/usr/lib/google-cloud-sdk",
    "/usr/share/google-cloud-sdk",
    "/usr/local/google-cloud-sdk",
    "/opt/google-cloud-sdk",
    "/opt/homebrew/share/google-cloud-sdk",
    "/snap/google-cloud-cli/current",
    "~/google-cloud-sdk",
)


class EmulatorMissing(Unavailable):
    """No emulator runs and none can be started; the message says in one line what to install."""

    code = "emulator_missing"
    retryable = False


@dataclass(frozen=True, slots=True)
class Kind:
    """What differs between the two. `jar` is a pattern below the SDK's folder, `main` "" runs the jar itself."""

    name: str
    variable: str
    jar: str
    main: str
    package: str


PUBSUB = Kind(
    "pubsub",
    "PUBSUB_EMULATOR_HOST",
    "platform/pubsub-emulator/lib/cloud-pubsub-emulator-*-all.jar",
    "",
    "google-cloud-cli-pubsub-emulator",
)
FIRESTORE = Kind(
    "firestore",
    "FIRESTORE_EMULATOR_HOST",
    "platform/cloud-firestore-emulator/cloud-firestore-emulator.jar",
    "com.google.cloud.datastore.emulator.firestore.CloudFirestore",
    "google-cloud-cli-firestore-emulator",
)


@asynccontextmanager
async def pubsub_emulator() -> AsyncIterator[str]:
    """A Pub/Sub emulator's "host:port". One started here ends on the way out, or with this process.

    Raises EmulatorMissing.
    """
    async with _emulator(PUBSUB, None) as host:
        yield host


@asynccontextmanager
async def firestore_emulator(rules: Path | None = None) -> AsyncIterator[str]:
    """A Firestore emulator's "host:port", as `pubsub_emulator`; its documents live in its memory only.

    `rules` are the security rules of every project; one that runs already keeps those it has.
    """
    async with _emulator(FIRESTORE, rules) as host:
        yield host


@asynccontextmanager
async def _emulator(kind: Kind, rules: Path | None) -> AsyncIterator[str]:
    running = os.environ.get(kind.variable)
    if running:
        if not await _answers(running, ANSWER_SECONDS):
            raise EmulatorMissing(f"{kind.variable} is {running}, but nothing answers there; start it or unset it")
        yield running
        return
    for last in (False,) * (TRIES - 1) + (True,):
        port = free_port()
        process, log = await launch(kind, port, rules)
        try:
            if await _ready(process, f"127.0.0.1:{port}"):
                yield f"127.0.0.1:{port}"
                return
            if last:
                raise EmulatorMissing(f"the {kind.name} emulator did not start: {_last_line(log)}")
        finally:
            await end(process)
            log.close()


async def launch(kind: Kind, port: int, rules: Path | None = None) -> tuple[asyncio.subprocess.Process, IO[bytes]]:
    """Start one on `port` and return its keeper, which ends it when its standard input closes, and its log.

    Raises EmulatorMissing where there is nothing to start.
    """
    command = _command(kind, port, rules)
    log = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
    )
    return process, log


async def end(process: asyncio.subprocess.Process) -> None:
    """End what `launch` started, and wait until it is gone."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(END_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def free_port() -> int:
    """A TCP port on the loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _command(kind: Kind, port: int, rules: Path | None) -> list[str]:
    java, jar = _java(), _jar(kind)
    if java and jar:
        start = ["-cp", str(jar), kind.main] if kind.main else ["-jar", str(jar)]
        wanted = [f"--rules={rules.absolute()}"] if rules else []
        emulator = [java, *JAVA_OPTIONS, *start, "--host=127.0.0.1", f"--port={port}", *wanted]
        return [sys.executable, "-I", "-S", leash.__file__, *emulator]
    docker = shutil.which("docker")
    if docker:
        return _docker_command(docker, kind, port, rules)
    raise EmulatorMissing(
        f"no {kind.name} emulator: install Java and the Google Cloud CLI's {kind.package}, or Docker, "
        f"or set {kind.variable}"
    )


def _docker_command(docker: str, kind: Kind, port: int, rules: Path | None) -> list[str]:
    mount = ["-v", f"{rules.absolute()}:/firestore.rules:ro"] if rules else []
    wanted = ["--rules=/firestore.rules"] if rules else []
    run = [docker, "run", "--rm", "--init", "-i", "-p", f"127.0.0.1:{port}:{port}", *mount, IMAGE]
    emulator = ["gcloud", "emulators", kind.name, "start", f"--host-port=0.0.0.0:{port}", "--project=local", *wanted]
    return [*run, "sh", "-c", DOCKER_SCRIPT, "sh", *emulator]


def _java() -> str | None:
    home = os.environ.get("JAVA_HOME")
    return (shutil.which("java", path=str(Path(home, "bin"))) if home else None) or shutil.which("java")


def _jar(kind: Kind) -> Path | None:
    """The newest jar of the first SDK that has one."""
    for sdk in _sdks():
        jars = sorted(sdk.glob(kind.jar), key=_version)
        if jars:
            return jars[-1]
    return None


def _sdks() -> Iterator[Path]:
    yield from (Path(os.environ[name]) for name in SDK_VARIABLES if os.environ.get(name))
    gcloud = shutil.which("gcloud")
    if gcloud:
        yield Path(gcloud).resolve().parent.parent
    yield from (Path(place).expanduser() for place in SDK_PLACES)


def _version(jar: Path) -> list[int]:
    return [int(part) for part in "".join(c if c.isdigit() else " " for c in jar.name).split()]


async def _ready(process: asyncio.subprocess.Process, host: str) -> bool:
    """Whether it answers before it ends or the time is over."""
    answer = asyncio.ensure_future(_answers(host, START_SECONDS))
    ended = asyncio.ensure_future(process.wait())
    try:
        await asyncio.wait([answer, ended], return_when=asyncio.FIRST_COMPLETED)
        return answer.done() and answer.result()
    finally:
        answer.cancel()
        ended.cancel()


async def _answers(host: str, patience: float) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(patience):
            while not await _says_ok(host):  # noqa: ASYNC110 - nothing tells us but itself
                await asyncio.sleep(LOOK_SECONDS)
            return True
    return False


async def _says_ok(host: str) -> bool:
    name, _, port = host.rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(name.strip("[]"), int(port))
    except (OSError, ValueError):
        return False
    try:
        writer.write(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return b" 200 " in await reader.readline()
    except OSError:
        return False
    finally:
        writer.close()


def _last_line(log: IO[bytes]) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - LOG_TAIL_BYTES))
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
