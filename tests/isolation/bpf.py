"""Runs an assembled system-call filter as the kernel would, for tests of what it decides."""

from __future__ import annotations

import struct


def decide(program: bytes, number: int, arch: int, *arguments: int) -> int:
    """The action for a call with these arguments. Raises ValueError for a program the kernel would not load."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    call = struct.pack("<IIQ6Q", number, arch, 0, *(argument & (1 << 64) - 1 for argument in padded))
    code = list(struct.iter_unpack("<HBBI", program))
    accumulator = at = 0
    while True:
        operation, then, otherwise, value = code[at]
        at += 1
        match operation:
            case 0x06:
                return int(value)
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", call, value)
            case 0x15:
                at += then if accumulator == value else otherwise
            case 0x35:
                at += then if accumulator >= value else otherwise
            case 0x45:
                at += then if accumulator & value else otherwise
            case _:
                raise ValueError(f"no such operation: {operation:#x}")
