"""The Python that a sandbox offers: a virtual environment of its own, made once and mounted read-only."""

from __future__ import annotations

import fcntl
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


def prefixes(python: Path) -> list[str]:
    """The directories that must be there, at these paths, for this environment's interpreter to run."""
    home = [str(python.parent.parent), sys.base_prefix]
    real = os.path.realpath(python)
    if not any(real.startswith(os.path.realpath(prefix) + "/") for prefix in home):
        home.append(str(Path(real).parent.parent))
    return home


def compiled(program: Path, name: str, *, interpreter: Path, directory: Path) -> Path:
    """A program of one file, compiled for this interpreter: it starts some 20 to 30 ms sooner.

    It is kept in `directory`, one for each content; tracebacks show `name`. Raises SandboxFailed.
    """
    digest = hashlib.sha256(name.encode() + program.read_bytes()).hexdigest()[:16]
    code = directory / f"{program.stem}-{digest}.pyc"
    if not code.exists():
        script = f"import py_compile; py_compile.compile({str(program)!r}, {str(code)!r}, {name!r}, doraise=True)"
        done = subprocess.run([str(interpreter), "-I", "-S", "-c", script], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SandboxFailed(f"{program.name} does not compile for {interpreter}: {done.stderr.strip()}")
    return code


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
