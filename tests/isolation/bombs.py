"""Runs inside a sandbox and uses up what it can get. Standard library only.

The arguments name the bomb; what it reached goes to result.json.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

MIB = 1 << 20
ENDLESS = 64 * 1024  # more than any limit under test


def fork() -> dict[str, object]:
    """Fork until the kernel refuses."""
    children: list[int] = []
    try:
        while len(children) < ENDLESS:
            pid = os.fork()
            if pid == 0:
                time.sleep(300)
            children.append(pid)
    except OSError as error:
        return {"reached": len(children), "refused": errno.errorcode[error.errno or 0]}
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return {"reached": len(children)}


def memory() -> dict[str, object]:
    """Take memory in one process until it is refused, or until the process is killed for it."""
    pid = os.fork()
    if pid == 0:
        held: list[bytearray] = []
        try:
            while len(held) < ENDLESS:
                held.append(bytearray(os.urandom(MIB)))
        except MemoryError:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return {"refused": os.waitstatus_to_exitcode(status) in (3, -signal.SIGKILL)}


def many() -> dict[str, object]:
    """Take memory in many processes at once; what becomes of the sandbox is for the host to see."""
    while True:
        try:
            if os.fork() == 0:
                held: list[bytearray] = []
                while True:
                    held.append(bytearray(os.urandom(MIB)))
        except (OSError, MemoryError):
            continue


def anonymous_files() -> dict[str, object]:
    """Take memory in files without a name."""
    held: list[int] = []
    try:
        while len(held) < ENDLESS:
            held.append(os.memfd_create("bomb"))
            os.write(held[-1], bytes(MIB))
    except OSError as error:
        return {"reached": len(held), "refused": errno.errorcode[error.errno or 0]}
    return {"reached": len(held)}


def disk(folder: str) -> dict[str, object]:
    """Write files until the disk is full."""
    written, number = 0, 0
    block = bytes(MIB)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    while written < ENDLESS * MIB:
        try:
            with open(f"{folder}/bomb-{number}", "ab", buffering=0) as file:
                written += file.write(block)
        except OSError as error:
            if error.errno == errno.EFBIG:
                number += 1
                continue
            return {"reached": written // MIB, "refused": errno.errorcode[error.errno or 0], "files": number + 1}
    return {"reached": written // MIB}


def inodes(folder: str) -> dict[str, object]:
    """Make empty files until it is refused, or until there are clearly enough of them."""
    made = 0
    os.mkdir(f"{folder}/inodes")
    try:
        while made < 3_000_000:
            os.close(os.open(f"{folder}/inodes/{made}", os.O_CREAT | os.O_WRONLY))
            made += 1
    except OSError as error:
        return {"reached": made, "refused": errno.errorcode[error.errno or 0]}
    finally:
        shutil.rmtree(f"{folder}/inodes", ignore_errors=True)
    return {"reached": made}


BOMBS: dict[str, Callable[..., dict[str, object]]] = {
    "fork": fork,
    "memory": memory,
    "many": many,
    "anonymous files": anonymous_files,
    "disk": disk,
    "inodes": inodes,
}

if __name__ == "__main__":
    name, *arguments = json.loads(Path("/workspace/arguments.json").read_text())
    result = BOMBS[name](*arguments)
    for path in Path("/workspace").glob("bomb-*"):
        path.unlink()
    Path("/workspace/result.json").write_text(json.dumps(result))
    sys.exit(0)
