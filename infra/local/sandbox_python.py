"""The Python that a sandbox offers: a virtual environment of its own, made once and mounted read-only."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import SandboxFailed

MARKER = "pigeon-complete.json"  # written last: without it the environment was cut short and is made anew


def ensure_python(state: Path) -> Path:
    """The interpreter of the environment at `state`/python, which is made if it is not there yet.

    Blocks, for a few seconds the first time; processes that ask at once wait for one of them. An environment of
    another Python version, or one whose making was cut short, is replaced. Raises SandboxFailed.
    """
    directory = state.absolute() / "python"
    state.mkdir(parents=True, exist_ok=True)
    with _locked(state / "python.lock"):
        if _describe() != _marked(directory):
            shutil.rmtree(directory, ignore_errors=True)
            _make(directory)
            (directory / MARKER).write_text(json.dumps(_describe()))
    return directory / "bin" / "python3"


@functools.cache
def prefixes(python: Path) -> list[str]:
    """The directories that must be there, at these paths, for this interpreter to run. Raises SandboxFailed."""
    home = json.loads(_run(python, "import json, sys; print(json.dumps([sys.prefix, sys.base_prefix]))"))
    real = os.path.realpath(python)
    if not any(real.startswith(os.path.realpath(prefix) + "/") for prefix in home):
        home.append(str(Path(real).parent.parent))
    return list(dict.fromkeys(home))


def compiled(program: Path, name: str, *, interpreter: Path, directory: Path) -> Path:
    """A program of one file, compiled for this interpreter: it starts some 20 to 30 ms sooner.

    It is kept in `directory`, one for each content; tracebacks show `name`. Raises SandboxFailed.
    """
    digest = hashlib.sha256(b"\0".join([bytes(interpreter), name.encode(), program.read_bytes()])).hexdigest()
    code = directory / f"{program.stem}-{digest[:16]}.pyc"
    if not code.exists():
        directory.mkdir(parents=True, exist_ok=True)
        _run(interpreter, f"import py_compile; py_compile.compile({str(program)!r}, {str(code)!r}, {name!r}, True)")
    return code


def programs(python: Path, state: Path) -> Path:
    """Where compiled programs are kept: with the environment if we made it, else with our own state."""
    environment = python.parent.parent
    return environment if (environment / MARKER).exists() else state / "programs"


def _run(python: Path, script: str) -> str:
    try:
        done = subprocess.run([str(python), "-I", "-c", script], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise SandboxFailed(f"the sandboxes' Python does not work: {python}: {said.strip()}") from error
    return done.stdout


def _make(directory: Path) -> None:
    """With pip where the interpreter brings ensurepip (Debian keeps it in python3-venv), else without."""
    for options in ([], ["--without-pip"]):
        made = subprocess.run(
            [sys.executable, "-I", "-m", "venv", "--clear", *options, str(directory)],
            capture_output=True,
            text=True,
            check=False,
            umask=0o022,  # a sandbox's user must be able to read it
        )
        if made.returncode == 0:
            return
    raise SandboxFailed(f"no Python environment for the sandboxes: {made.stderr.strip() or made.stdout.strip()}")


def _describe() -> dict[str, str]:
    return {"version": sys.version, "prefix": sys.base_prefix}


def _marked(directory: Path) -> object:
    try:
        return json.loads((directory / MARKER).read_text())
    except (OSError, ValueError):
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
