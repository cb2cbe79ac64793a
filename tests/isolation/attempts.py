"""Runs inside a sandbox and tries to get out: every attempt is expected to fail. Standard library only.

`ATTEMPTS` maps what is tried to a function that raises OSError when it is kept from it, and otherwise returns what
it got. The outcomes go to result.json.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import resource
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ATTEMPTS: dict[str, Callable[[], object]] = {}
GIVEN: dict[str, Any] = {}  # what the host says of itself, see test_attempts.py
NUMBERS = {  # x86_64, aarch64
    "mount": (165, 40),
    "umount2": (166, 39),
    "fsopen": (430, 430),
    "open_tree": (428, 428),
    "unshare": (272, 97),
    "setns": (308, 268),
    "clone": (56, 220),
    "clone3": (435, 435),
    "open_by_handle_at": (304, 265),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "reboot": (169, 142),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "init_module": (175, 105),
    "personality": (135, 92),
    "kexec_load": (246, 104),
}
CLONE_NEWUSER = 0x10000000


def attempt(name: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Register a function under what it tries."""

    def register(function: Callable[[], object]) -> Callable[[], object]:
        ATTEMPTS[name] = function
        return function

    return register


def call(name: str, *arguments: Any) -> int:
    """A system call. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = NUMBERS[name][platform.machine() == "aarch64"]
    answer: int = libc.syscall(ctypes.c_long(number), *arguments)
    if answer < 0:
        raise OSError(ctypes.get_errno(), name)
    return answer


def kept_out(reason: str) -> OSError:
    """A failure that the kernel did not have to tell."""
    return OSError(errno.EACCES, reason)


def read(path: str) -> object:
    """A directory's names or a file's first bytes."""
    return os.listdir(path) if os.path.isdir(path) else Path(path).read_bytes()[:40]


def reading(path: str) -> Callable[[], object]:
    """Try to read a file or a directory."""
    return lambda: read(path)


def opening(path: str, flags: int) -> Callable[[], object]:
    """Try to open a file."""

    def open_it() -> object:
        os.close(os.open(path, flags))
        return "opened"

    return open_it


def register_files() -> None:
    """Files of the host, and files of the sandbox's own system."""
    for path in (
        "/etc/shadow",
        "/root/.ssh",
        "/home",
        "/var/lib",
        "/var/log",
        "/run/dbus",
        "/sys",
        "/boot",
        "/mnt",
        "/srv",
    ):
        ATTEMPTS[f"read {path}"] = reading(path)
    for path in ("/proc/1/root/etc/shadow", "/proc/1/cwd", "/proc/1/environ", "/proc/1/fd", "/proc/1/maps"):
        ATTEMPTS[f"read {path}"] = reading(path)
    for path in (
        "/usr/x",
        "/etc/x",
        "/x",
        "/dev/x",
        "/opt/x",
        "/opt/pigeon/agent.py",
        "/bin/sh",
        "/etc/passwd",
        "/run/x",
    ):
        ATTEMPTS[f"write {path}"] = opening(path, os.O_WRONLY | os.O_CREAT)
    for path in (
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sys/kernel/hostname",
        "/proc/sys/vm/overcommit_memory",
        "/proc/sys/net/ipv4/ip_forward",
        "/proc/sysrq-trigger",
        "/proc/1/mem",
        "/proc/1/oom_score_adj",
        "/proc/1/exe",
        "/proc/kcore",
    ):
        ATTEMPTS[f"write {path}"] = opening(path, os.O_WRONLY)
    for path in (
        "/dev/kvm",
        "/dev/mem",
        "/dev/vda",
        "/dev/sda",
        "/dev/kmsg",
        "/dev/fuse",
        "/dev/net/tun",
        "/dev/vsock",
    ):
        ATTEMPTS[f"open {path}"] = opening(path, os.O_RDONLY)
    ATTEMPTS["open /proc/kcore"] = opening("/proc/kcore", os.O_RDONLY)
    ATTEMPTS["open /proc/kmsg"] = opening("/proc/kmsg", os.O_RDONLY)


register_files()


@attempt("read the host's secret file")
def _() -> object:
    return read(GIVEN["secret_file"])


@attempt("list the sandboxes' folder")
def _() -> object:
    return read(GIVEN["sandboxes"])


@attempt("find the host's environment anywhere in /proc")
def _() -> object:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name in ("environ", "cmdline"):
            try:
                content = Path(f"/proc/{pid}/{name}").read_bytes()
            except OSError:
                continue
            if b"SECRET_OF_THE_HOST" in content or GIVEN["sandboxes"].encode() in content:
                return f"{pid}/{name}: {content[:200]!r}"
    raise kept_out("not there")


@attempt("see processes of the host")
def _() -> object:
    names = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in filter(str.isdigit, os.listdir("/proc"))}
    if foreign := names - {"python3", "bash", "sh"}:
        return sorted(foreign)
    raise kept_out("only ours")


@attempt("inherit a descriptor of the host")
def _() -> object:
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    if foreign := [link for link in links if not link.startswith(("/dev/pts/", "/proc/", "/workspace/"))]:
        return foreign
    raise kept_out("only the terminal")


@attempt("kill a process of the host")
def _() -> object:
    os.kill(GIVEN["pid"], signal.SIGKILL)
    return "killed"


@attempt("kill the agent")
def _() -> object:
    os.kill(1, signal.SIGKILL)
    time.sleep(0.2)
    raise kept_out("we are still here")


def connect(family: int, address: Any) -> object:
    """Connect and read."""
    with socket.socket(family) as sock:
        sock.settimeout(2)
        sock.connect(address)
        return sock.recv(10)


@attempt("connect to a TCP port of the host")
def _() -> object:
    return connect(socket.AF_INET, ("127.0.0.1", GIVEN["port"]))


@attempt("connect to the internet")
def _() -> object:
    return connect(socket.AF_INET, ("192.0.2.1", 80))


@attempt("connect to the metadata server")
def _() -> object:
    return connect(socket.AF_INET, ("169.254.169.254", 80))


@attempt("resolve a name")
def _() -> object:
    return socket.getaddrinfo("example.com", 80)


@attempt("connect to an abstract socket of the host")
def _() -> object:
    return connect(socket.AF_UNIX, "\0" + GIVEN["abstract"])


def making(family: int, kind: int) -> Callable[[], object]:
    """Try to make a socket."""
    return lambda: socket.socket(family, kind)


def register_sockets() -> None:
    """Socket families beyond Unix and IP."""
    kinds = {"AF_VSOCK": 40, "AF_PACKET": 17, "AF_NETLINK": 16, "AF_ALG": 38, "AF_BLUETOOTH": 31, "AF_XDP": 44}
    for name, family in kinds.items():
        for kind in (socket.SOCK_RAW, socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
            ATTEMPTS[f"socket {name} {kind.name}"] = making(family, kind)
    ATTEMPTS["raw IP socket"] = lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)


register_sockets()
ATTEMPTS["mount a tmpfs"] = lambda: call("mount", b"none", b"/tmp", b"tmpfs", 0, 0)
ATTEMPTS["remount / writable"] = lambda: call("mount", 0, b"/", 0, 0x20 | 0x1000, 0)
ATTEMPTS["unmount /usr"] = lambda: call("umount2", b"/usr", 2)
ATTEMPTS["fsopen"] = lambda: call("fsopen", b"tmpfs", 0)
ATTEMPTS["open_tree"] = lambda: call("open_tree", -100, b"/usr", 1)
ATTEMPTS["unshare a user namespace"] = lambda: call("unshare", CLONE_NEWUSER)
ATTEMPTS["unshare a mount namespace"] = lambda: call("unshare", 0x20000)
ATTEMPTS["unshare a network namespace"] = lambda: call("unshare", 0x40000000)
ATTEMPTS["enter the agent's mount namespace"] = lambda: call("setns", os.open("/proc/1/ns/mnt", 0), 0)
ATTEMPTS["enter our own user namespace anew"] = lambda: call("setns", os.open("/proc/self/ns/user", 0), 0)
ATTEMPTS["chroot"] = lambda: os.chroot("/tmp")
ATTEMPTS["open a file by handle"] = lambda: call("open_by_handle_at", -100, struct.pack("IIQ", 8, 1, 2), 0)
ATTEMPTS["trace the agent"] = lambda: call("ptrace", 16, 1, 0, 0)
ATTEMPTS["read the agent's memory"] = lambda: call("process_vm_readv", 1, b"\0" * 16, 1, b"\0" * 16, 1, 0)
ATTEMPTS["become root"] = lambda: os.setuid(0)
ATTEMPTS["become another user"] = lambda: os.setuid(1)
ATTEMPTS["join another group"] = lambda: os.setgroups([0])
ATTEMPTS["take precedence"] = lambda: os.nice(-5)
ATTEMPTS["schedule in real time"] = lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
ATTEMPTS["reboot"] = lambda: call("reboot", 0xFEE1DEAD - (1 << 32), 672274793, 0, 0)
ATTEMPTS["rename the host"] = lambda: socket.sethostname("x")
ATTEMPTS["set the clock"] = lambda: time.clock_settime(time.CLOCK_REALTIME, time.time())
ATTEMPTS["load a BPF program"] = lambda: call("bpf", 0, ctypes.create_string_buffer(64), 64)
ATTEMPTS["set up io_uring"] = lambda: call("io_uring_setup", 4, ctypes.create_string_buffer(120))
ATTEMPTS["count performance events"] = lambda: call(
    "perf_event_open", ctypes.create_string_buffer(struct.pack("II", 1, 112) + b"\0" * 104), 0, -1, -1, 0
)
ATTEMPTS["handle page faults"] = lambda: call("userfaultfd", 1)
ATTEMPTS["use the session's key ring"] = lambda: call("keyctl", 0, -3, 1)
ATTEMPTS["add a key"] = lambda: call("add_key", b"user", b"x", b"y", 1, -3)
ATTEMPTS["load a module"] = lambda: call("init_module", 0, 0, b"")
ATTEMPTS["load a kernel"] = lambda: call("kexec_load", 0, 0, 0, 0)
ATTEMPTS["change the personality"] = lambda: call("personality", 0x40000)
ATTEMPTS["make a memory device"] = lambda: os.mknod("/workspace/mem", 0o20666, os.makedev(1, 1))
ATTEMPTS["make a disk device"] = lambda: os.mknod("/tmp/vda", 0o60666, os.makedev(254, 0))
ATTEMPTS["raise the process limit"] = lambda: resource.setrlimit(resource.RLIMIT_NPROC, (100_000, 100_000))
ATTEMPTS["raise the file size limit"] = lambda: resource.setrlimit(
    resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
)


@attempt("clone a user namespace")
def _() -> object:
    pid = call("clone", CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "cloned"


@attempt("clone a user namespace with clone3")
def _() -> object:
    pid = call("clone3", struct.pack("QQQQQQQQ", CLONE_NEWUSER, 0, 0, 0, signal.SIGCHLD, 0, 0, 0), 64)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "cloned"


@attempt("type into our own terminal")
def _() -> object:
    _, terminal = os.openpty()
    return fcntl.ioctl(terminal, 0x5412, b"x")


@attempt("type into our own terminal with the high bits set")
def _() -> object:
    _, terminal = os.openpty()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ioctl(terminal, ctypes.c_ulong(0x5412 | 1 << 32), ctypes.create_string_buffer(b"x")) < 0:
        raise OSError(ctypes.get_errno(), "ioctl")
    return "typed"


@attempt("have capabilities")
def _() -> object:
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    held = {name: status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb") if int(status[name], 16)}
    if held or status["NoNewPrivs"] != "1" or status["Seccomp"] != "2":
        return {**held, "NoNewPrivs": status["NoNewPrivs"], "Seccomp": status["Seccomp"]}
    raise kept_out("none")


@attempt("run as root on the host")
def _() -> object:
    inside, outside, count = map(int, Path("/proc/self/uid_map").read_text().split())
    if count == 1 and inside == os.getuid() != 0:
        raise kept_out("one user, not root; test_records looks at which one from outside")
    if "user" not in GIVEN["namespaces"] and os.getresuid() == os.getresgid() == (os.getuid(),) * 3 != (0,) * 3:
        raise kept_out("no user namespace, but a user of its own")
    return os.getresuid(), (inside, outside, count)


@attempt("share a namespace with the host")
def _() -> object:
    shared = {
        name: number for name, number in GIVEN["namespaces"].items() if os.readlink(f"/proc/self/ns/{name}") == number
    }
    if shared:
        return shared
    raise kept_out("none")


@attempt("find a writable mount without a size")
def _() -> object:
    unsized = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        point, flags = mount.split()[4:6]
        kind = source.split()[0]
        if "ro" not in flags.split(",") and kind not in ("proc", "devpts", "devtmpfs") and "size=" not in source:
            unsized.append(point)
    if unsized:
        return unsized
    raise kept_out("none")


@attempt("find a mount that honours setuid")
def _() -> object:
    mounts = [line.split()[4:6] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    if honouring := [point for point, flags in mounts if "nosuid" not in flags.split(",")]:
        return honouring
    raise kept_out("none")


@attempt("write below /proc/sys or /sys")
def _() -> object:
    writable = []
    for top, _, names in os.walk("/proc/sys"):
        writable += [path for name in names if os.access(path := os.path.join(top, name), os.W_OK)]
    if writable:
        return writable[:10]
    raise kept_out("nothing")


def setuid_program(*words: str) -> Callable[[], object]:
    """Try to gain root by a program that is setuid on the host."""

    def run() -> object:
        done = subprocess.run(words, capture_output=True, text=True, timeout=5, stdin=subprocess.DEVNULL, check=False)
        if "uid=0" in done.stdout or done.returncode == 0:
            return done.stdout
        raise kept_out(done.stderr)

    return run


ATTEMPTS["su"] = setuid_program("su", "-c", "id")
ATTEMPTS["sudo"] = setuid_program("sudo", "-n", "id")
ATTEMPTS["mount, the program"] = setuid_program("mount", "-t", "tmpfs", "x", "/tmp")
ATTEMPTS["nsenter"] = setuid_program("nsenter", "-t", "1", "-a", "id")
ATTEMPTS["unshare, the program"] = setuid_program("unshare", "-Ur", "id")


@attempt("gain a user by a setuid copy")
def _() -> object:
    shutil.copy("/usr/bin/id", "/workspace/id")
    os.chmod("/workspace/id", 0o6755)
    told = subprocess.run(["/workspace/id"], capture_output=True, text=True, check=True).stdout
    if "euid" in told or "uid=0" in told:
        return told
    raise kept_out("nobody")


def outcome(function: Callable[[], object]) -> str:
    """ "kept out: ..." or what was got."""
    try:
        got = function()
    except OSError as error:
        return f"kept out: {errno.errorcode.get(error.errno or 0, error)}"
    except (subprocess.SubprocessError, ValueError) as error:  # setrlimit raises ValueError
        return f"kept out: {error}"
    return f"GOT {got!r}"


if __name__ == "__main__":
    GIVEN.update(json.loads(Path("/workspace/arguments.json").read_text()))
    results = {name: outcome(function) for name, function in ATTEMPTS.items()}
    Path("/workspace/result.json").write_text(json.dumps(results))
