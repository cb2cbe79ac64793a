"""The system-call filter, decided in a model of the kernel's machine."""

from __future__ import annotations

import errno
import socket

import pytest

from infra.local import seccomp
from infra.local.seccomp import (
    ALLOW,
    ARCHITECTURES,
    CALLS,
    ERRNO,
    KILL_PROCESS,
    Jump,
    Label,
    Line,
    Load,
    Return,
    assemble,
)
from tests.isolation.bpf import decide

REFUSE = ERRNO | errno.EPERM
HARMLESS = {"x86_64": {"read": 0, "execve": 59, "ptrace": 101}, "aarch64": {"read": 63, "execve": 221, "ptrace": 117}}


@pytest.fixture(params=ARCHITECTURES)
def machine(request: pytest.FixtureRequest) -> str:
    """Every architecture with a table."""
    return str(request.param)


def action(machine: str, number: int, *arguments: int, count_memory: bool = False) -> int:
    """What the filter decides on a native call."""
    return decide(seccomp.program(machine, count_memory=count_memory), number, ARCHITECTURES[machine][1], *arguments)


def number(machine: str, name: str) -> int:
    """A call that has a number everywhere."""
    return CALLS[name][ARCHITECTURES[machine][0]]


def test_everything_in_the_table_is_refused(machine: str) -> None:
    """No call of the list gets through, wherever its number lies."""
    for numbers in seccomp.REFUSED.values():
        if (found := numbers[ARCHITECTURES[machine][0]]) is not None:
            assert action(machine, found) == REFUSE


def test_no_number_is_listed_twice() -> None:
    """A slip in the table would refuse the wrong call and let the right one through."""
    for column in range(2):
        listed = [*seccomp.REFUSED.values(), *seccomp.REFUSED_UNCOUNTED.values(), *CALLS.values()]
        present = [numbers[column] for numbers in listed if numbers[column] is not None]
        assert len(present) == len(set(present))


def test_ordinary_calls_pass(machine: str) -> None:
    """Programs run, and debuggers work on their own processes."""
    for found in HARMLESS[machine].values():
        assert action(machine, found) == ALLOW


def test_uncounted_memory_is_refused_only_where_nothing_counts_it(machine: str) -> None:
    """memfd and shared memory are ordinary where a cgroup limits them."""
    for numbers in seccomp.REFUSED_UNCOUNTED.values():
        found = numbers[ARCHITECTURES[machine][0]]
        assert found is not None
        assert action(machine, found) == ALLOW
        assert action(machine, found, count_memory=True) == REFUSE


def test_threads_and_children_pass_but_namespaces_do_not(machine: str) -> None:
    """clone is decided by its flags; clone3, whose flags are in memory, does not exist."""
    clone = number(machine, "clone")
    assert action(machine, clone, 0x3D0F00) == ALLOW  # what pthread_create asks for
    assert action(machine, clone, 17) == ALLOW  # fork
    for bit in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert action(machine, clone, bit | 17) == REFUSE
    assert action(machine, number(machine, "clone3")) == ERRNO | errno.ENOSYS


def test_only_unix_and_ip_sockets_can_be_made(machine: str) -> None:
    """A network namespace does not stop AF_VSOCK; the filter does."""
    for name in ("socket", "socketpair"):
        for family in range(64):
            expected = ALLOW if family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6) else ERRNO | 97
            assert action(machine, number(machine, name), family) == expected


def test_nothing_types_into_a_terminal(machine: str) -> None:
    """TIOCSTI and TIOCLINUX are refused whatever the upper half of the request says: the kernel ignores it."""
    ioctl = number(machine, "ioctl")
    for request in (0x5412, 0x541C):
        assert action(machine, ioctl, 0, request) == REFUSE
        assert action(machine, ioctl, 0, request | 1 << 32) == REFUSE
    assert action(machine, ioctl, 0, 0x5413) == ALLOW  # TIOCGWINSZ


def test_another_architectures_calls_end_the_process(machine: str) -> None:
    """32-bit calls have other numbers: they would go round the table."""
    assert decide(seccomp.program(machine), 0, 0x40000003) == KILL_PROCESS


def test_x32_calls_do_not_exist() -> None:
    """The x32 ABI has the same architecture and other numbers."""
    assert action("x86_64", 0x40000000 | 165) == ERRNO | errno.ENOSYS


def test_an_unknown_architecture_is_an_error() -> None:
    """Without a table there is no sandbox, rather than one without a filter."""
    with pytest.raises(KeyError):
        seccomp.program("riscv64")


def test_labels_become_distances() -> None:
    """The assembler resolves jumps over any lines between."""
    program = assemble([Load(0), Jump("==", 7, "yes", "no"), Label("no"), Return(1), Label("yes"), Return(2)])
    assert (decide(program, 7, 0), decide(program, 8, 0)) == (2, 1)


def test_a_jump_that_cannot_be_encoded_is_an_error() -> None:
    """Classic BPF jumps forward, and 255 lines at the most."""
    far: list[Line] = [Jump("==", 1, "far"), *[Load(0)] * 256, Label("far"), Return(0)]
    back: list[Line] = [Label("back"), Load(0), Jump("==", 1, "back"), Return(0)]
    for lines in (far, back):
        with pytest.raises(ValueError, match="cannot jump"):
            assemble(lines)
