"""Starts one sandbox and goes away: run as `python -I -S sandbox_launch.py`, with a plan on standard input.

It is a program of its own, standard library only, so that it starts in milliseconds and so that whoever asked for
the sandbox may die without taking it along. Nothing runs before `process.json` says who it is, so that it can be
found and ended: first the monitor, then the sandbox's first process. What goes wrong is written to `failure`.

The plan is a marshalled dict (`json` would take as long to import as everything else here takes): `directory`,
`listen` and `lock` (inherited descriptors: the agent's listening socket, and a lock held for as long as the launch
is under way), `uid` (to drop to, or null), `cgroups` (directories to join), `file_bytes` (largest file),
`lifetime_seconds`, `bwrap` (its path, or null for no sandbox) in its `bwrap_root` (what must be reachable with it),
`arguments` (see infra/local/bubblewrap.py), `host_network` (whether it is shared), `command`, and `environment` and
`workspace` for a process without a sandbox.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import select
import stat
import sys
from typing import Any

LAUNCH_SECONDS = 20  # a launch that takes longer has failed
CLONE_NEWNS = 0x20000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_SLAVE = 0x2, 0x4, 0x1000, 0x4000, 0x80000
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446
ABSTRACT_UNIX_SOCKET = 1 << 128  # LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET, in the third 64 bits
SIGKILL = 9  # importing `signal` takes 8 ms
STAGES = ("/mnt", "/media", "/srv", "/opt", "/tmp")  # noqa: S108 - a mount point in a private namespace, not a file

Plan = dict[str, Any]


def main() -> int:
    """Launch what the plan on standard input describes; 0 once it runs."""
    plan: Plan = marshal.load(sys.stdin.buffer)  # noqa: S302 - from our own parent, the same interpreter
    os.umask(0o022)
    directory = os.open(plan["directory"], os.O_DIRECTORY)
    try:
        launch(plan, directory)
    except Exception as error:
        write_new(directory, "failure", str(error).encode())
        return 1
    return 0


def launch(plan: Plan, directory: int) -> None:
    """Fork the sandbox, record who it is, then let it go on. Raises OSError or RuntimeError."""
    info, info_writer = os.pipe()
    gate, opener = os.pipe()
    recorded, recorder = os.pipe()
    monitor = fork_orphan()
    if monitor == 0:
        os.close(recorder)
        become_sandbox(plan, directory, recorded, info_writer, gate)
    for descriptor in (info_writer, gate, recorded, plan["listen"]):
        os.close(descriptor)
    record(directory, monitor=monitor)
    os.write(recorder, b"1")
    process = hear(info)
    if process is None:
        os.kill(monitor, SIGKILL)
        raise RuntimeError(read("log", directory).strip() or "it ended before it was set up")
    record(directory, monitor=monitor, init=process)
    os.write(opener, b"1")


def fork_orphan() -> int:
    """Fork a grandchild that has no parent here any more; its pid, or 0 in itself.

    Bubblewrap ends a sandbox with its parent. That is to be the machine's init, rather than this process.
    """
    told, teller = os.pipe()
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        if grandchild == 0:
            return 0
        os.write(teller, b"%d" % grandchild)
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(told, 20))


def record(directory: int, **processes: int) -> None:
    """Write down who runs, for good: each by its pid and its start time, in clock ticks since boot."""
    told = [f'"boot": "{read("/proc/sys/kernel/random/boot_id").strip()}"']
    for role, pid in processes.items():
        start = int(read(f"/proc/{pid}/stat").rpartition(")")[2].split()[19])
        told.append(f'"{role}": {{"pid": {pid}, "start": {start}}}')
    write_new(directory, "process.json", f"{{{', '.join(told)}}}".encode())


def hear(info: int) -> int | None:
    """What bwrap says is the sandbox's first process, or None if it dies or takes too long to say it."""
    told = b""
    while select.select([info], [], [], LAUNCH_SECONDS)[0]:
        data = os.read(info, 4096)
        if not data:
            number = told.partition(b'"child-pid":')[2].lstrip()
            digits = number[: len(number) - len(number.lstrip(b"0123456789"))]
            return int(digits) if digits else None
        told += data
    return None


def become_sandbox(plan: Plan, directory: int, recorded: int, info: int, gate: int) -> None:
    """The forked half: limit this process and turn into the sandbox's monitor. Never returns."""
    try:
        os.setsid()
        os.close(plan["lock"])
        if not os.read(recorded, 1):
            os._exit(1)  # the launcher was killed before anybody could know of us
        log = append(directory, "log")
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan["file_bytes"], plan["file_bytes"]))
        libc("alarm", plan["lifetime_seconds"])  # outlasts exec, and ends the monitor, which ends the sandbox
        for cgroup in plan["cgroups"]:
            with open(os.path.join(cgroup, "cgroup.procs"), "w") as procs:
                procs.write("0")
        become = enter if plan["bwrap"] else supervise
        become(plan, info, gate, append(directory, "status"))
    except BaseException as error:
        os.write(2, f"{error}\n".encode())
    os._exit(1)


def enter(plan: Plan, info: int, gate: int, status: int) -> None:
    """Replace this process by bwrap, unprivileged where we are root, with no descriptor it does not need."""
    uid = plan["uid"]
    sources = [argument["source"] for argument in plan["arguments"] if "source" in argument]
    staged = stage([plan["bwrap_root"], *sources]) if uid is not None else {}
    reporting = ["--info-fd", str(info), "--block-fd", str(gate), "--json-status-fd", str(status)]
    words = [*(resolve(argument, staged) for argument in plan["arguments"]), *reporting]
    listing = in_memory(b"".join(os.fsencode(word) + b"\0" for word in words))
    for descriptor in (info, gate, status):
        os.set_inheritable(descriptor, True)
    binary = plan["bwrap"].replace(plan["bwrap_root"], staged.get(plan["bwrap_root"], plan["bwrap_root"]), 1)
    if plan["host_network"]:
        leave_abstract_sockets()
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    # an empty environment and the arguments by descriptor: the sandbox can read both of its first process
    os.execve(binary, [binary, "--args", str(listing), "--", *plan["command"]], {})  # noqa: S606


def supervise(plan: Plan, info: int, gate: int, status: int) -> None:
    """Without a sandbox: start the command and report on it in bwrap's words."""
    child = os.fork()
    if child == 0:
        os.close(info)
        os.read(gate, 1)
        libc("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what it leaves behind stays findable below it
        libc("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        os.chdir(plan["workspace"])
        os.execve(plan["command"][0], plan["command"], plan["environment"])  # noqa: S606
    os.close(plan["listen"])
    os.write(info, b'{"child-pid": %d }' % child)
    os.close(info)
    _, ended = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(ended)
    os.write(status, b'{"exit-code": %d }\n' % (code if code >= 0 else 128 - code))
    os._exit(0)


def resolve(argument: str | dict[str, Any], staged: dict[str, str]) -> str:
    """An argument as bwrap reads it; descriptors are opened here, with the rights we still have."""
    if isinstance(argument, str):
        return argument
    if "source" in argument:
        return staged.get(argument["source"], str(argument["source"]))
    if "data" in argument:
        return str(in_memory(argument["data"]))
    descriptor = os.open(argument["open"], os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    return str(descriptor)


def stage(paths: list[str]) -> dict[str, str]:
    """As root: bind each path where any user can reach it, in a mount namespace of our own; returns where.

    An unprivileged user may not pass through a directory such as /root on the way to an interpreter. The namespace,
    and the tmpfs in it, go away with the sandbox; nobody else sees them.
    """
    libc("unshare", CLONE_NEWNS)
    libc("mount", b"none", b"/", None, MS_REC | MS_SLAVE, None)
    origins = {path: os.open(path, os.O_PATH) for path in paths}  # the tmpfs may cover some of them
    where = next(filter(os.path.isdir, STAGES))
    libc("mount", b"tmpfs", where.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=0755,size=64k")
    staged = {}
    for index, (path, origin) in enumerate(origins.items()):
        staged[path] = target = f"{where}/{index}"
        if stat.S_ISDIR(os.fstat(origin).st_mode):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        libc("mount", f"/proc/self/fd/{origin}".encode(), target.encode(), None, MS_BIND | MS_REC, None)
        os.close(origin)
    return staged


def leave_abstract_sockets() -> None:
    """Cut this process off from abstract Unix sockets, which belong to a network: a desktop's is a way out of here.

    Landlock does that since Linux 6.12; an older kernel leaves them reachable.
    """
    scoped = ABSTRACT_UNIX_SOCKET.to_bytes(24, "little")  # struct landlock_ruleset_attr: nothing else is handled
    libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    try:
        ruleset = libc("syscall", LANDLOCK_CREATE_RULESET, scoped, len(scoped), 0)
    except OSError:
        return
    libc("syscall", LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def libc(name: str, *arguments: Any) -> int:
    """Call a function of the C library. Raises OSError where it answers with a negative number."""
    answer: int = getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments)
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return answer


def in_memory(content: bytes) -> int:
    """An inheritable descriptor from which this content is read."""
    descriptor = os.memfd_create("pigeon", 0)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def append(directory: int, name: str) -> int:
    """A descriptor that appends to a file of the sandbox's directory."""
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600, dir_fd=directory)


def write_new(directory: int, name: str, content: bytes) -> None:
    """Write a file of the sandbox's directory, whole or not at all."""
    descriptor = os.open(f"{name}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=directory)
    with open(descriptor, "wb") as file:
        file.write(content)
    os.rename(f"{name}.new", name, src_dir_fd=directory, dst_dir_fd=directory)


def read(path: str, directory: int | None = None) -> str:
    """The text of a small file."""
    with open(os.open(path, os.O_RDONLY, dir_fd=directory), errors="replace") as file:
        return file.read(4096)


if __name__ == "__main__":
    sys.exit(main())
