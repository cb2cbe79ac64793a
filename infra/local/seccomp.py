"""The system-call filter of a sandbox: a table of what is refused, and a small assembler for classic BPF.

Namespaces and missing capabilities already stop most of this; the filter takes away the kernel's attack surface
and what namespaces do not cover (AF_VSOCK, TIOCSTI, io_uring, nested user namespaces). Numbers come from the
kernel's asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64).
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# name: (x86_64, aarch64); None where the architecture has no such call
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # mounts and roots
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    # namespaces
    "unshare": (272, 97),
    "setns": (308, 268),
    # files outside the mount tree
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262),
    # the machine: modules, kernels, clocks, names, ports, logs
    "init_module": (175, 105),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    # key rings are per user, not per namespace
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # large kernel interfaces a terminal has no use for
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42),
    "uselib": (134, None),
    "ustat": (136, None),
    "sysfs": (139, None),
    "_sysctl": (156, None),
    # other processes' memory
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "personality": (135, 92),
}

# Memory that RLIMIT_AS does not count: refused as well where no cgroup counts it.
REFUSED_UNCOUNTED: dict[str, tuple[int | None, int | None]] = {
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
}

CALLS: dict[str, tuple[int, int]] = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "ioctl": (16, 29),
    "socket": (41, 198),
    "socketpair": (53, 199),
}

SOCKET_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6; not netlink, packet, alg, vsock and the like
TERMINAL_IOCTLS = (0x5412, 0x541C)  # TIOCSTI types into a terminal, TIOCLINUX pastes into a console
NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
X32_BIT = 0x40000000  # system calls of the x32 ABI, which would go round the table

ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
ERRNO = 0x00050000

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH

NUMBER, ARCH = 0, 4  # offsets in struct seccomp_data


def argument(index: int) -> int:
    """The offset of an argument's low 32 bits in struct seccomp_data (little endian)."""
    return 16 + 8 * index


@dataclass(frozen=True, slots=True)
class Label:
    """A place to jump to."""

    name: str


@dataclass(frozen=True, slots=True)
class Load:
    """Load 32 bits of struct seccomp_data into the accumulator."""

    offset: int


@dataclass(frozen=True, slots=True)
class Jump:
    """Compare the accumulator with `value`; go to a label, or on to the next line where the label is ""."""

    test: str  # "==" equal, ">=" at least, "&" any bit in common
    value: int
    then: str = ""
    otherwise: str = ""


@dataclass(frozen=True, slots=True)
class Return:
    """End with this action."""

    action: int


Line = Label | Load | Jump | Return

_TESTS = {"==": 0x15, ">=": 0x35, "&": 0x45}
_LOAD, _RETURN = 0x20, 0x06


def assemble(lines: Sequence[Line]) -> bytes:
    """The program as an array of struct sock_filter. Raises ValueError for a jump backwards or over 255 lines."""
    places: dict[str, int] = {}
    code: list[Load | Jump | Return] = []
    for line in lines:
        if isinstance(line, Label):
            places[line.name] = len(code)
        else:
            code.append(line)

    def distance(label: str, at: int) -> int:
        steps = places[label] - at - 1 if label else 0
        if not 0 <= steps <= 255:
            raise ValueError(f"cannot jump {steps} lines to {label!r}")
        return steps

    return b"".join(_encode(line, at, distance) for at, line in enumerate(code))


def _encode(line: Load | Jump | Return, at: int, distance: Callable[[str, int], int]) -> bytes:
    match line:
        case Load(offset):
            return struct.pack("<HBBI", _LOAD, 0, 0, offset)
        case Jump(test, value, then, otherwise):
            return struct.pack("<HBBI", _TESTS[test], distance(then, at), distance(otherwise, at), value)
        case Return(action):
            return struct.pack("<HBBI", _RETURN, 0, 0, action)


def rules(machine: str, *, count_memory: bool) -> list[Line]:
    """The filter of one architecture; with `count_memory` (no cgroup does it) it refuses memory RLIMIT_AS misses."""
    column, audit_arch = ARCHITECTURES[machine]
    refused = {**REFUSED, **(REFUSED_UNCOUNTED if count_memory else {})}
    call = {name: numbers[column] for name, numbers in CALLS.items()}
    return [
        Load(ARCH),
        Jump("==", audit_arch, otherwise="kill"),
        Load(NUMBER),
        *([Jump(">=", X32_BIT, then="no such call")] if machine == "x86_64" else []),
        *(Jump("==", number, then="refuse") for number in sorted(_present(refused, column))),
        Jump("==", call["clone3"], then="no such call"),  # its flags are out of reach; libc falls back to clone
        Jump("==", call["clone"], then="clone"),
        Jump("==", call["ioctl"], then="ioctl"),
        Jump("==", call["socket"], then="socket"),
        Jump("==", call["socketpair"], then="socket"),
        Return(ALLOW),
        Label("clone"),
        Load(argument(0)),
        Jump("&", NAMESPACE_FLAGS, then="refuse"),
        Return(ALLOW),
        Label("ioctl"),
        Load(argument(1)),
        *(Jump("==", request, then="refuse") for request in TERMINAL_IOCTLS),
        Return(ALLOW),
        Label("socket"),
        Load(argument(0)),
        *(Jump("==", family, then="allow") for family in SOCKET_FAMILIES),
        Return(ERRNO | errno.EAFNOSUPPORT),
        Label("allow"),
        Return(ALLOW),
        Label("refuse"),
        Return(ERRNO | errno.EPERM),
        Label("no such call"),
        Return(ERRNO | errno.ENOSYS),
        Label("kill"),
        Return(KILL_PROCESS),
    ]


def program(machine: str | None = None, *, count_memory: bool = False) -> bytes:
    """The assembled filter for `bwrap --seccomp`. Raises KeyError for an architecture without a table."""
    return assemble(rules(machine or platform.machine(), count_memory=count_memory))


def _present(table: dict[str, tuple[int | None, int | None]], column: int) -> set[int]:
    return {number for numbers in table.values() if (number := numbers[column]) is not None}
