"""The program that is executed in pods: the agent's pump, handed over on a command line."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import quote

import pytest

from infra.adapters.kube_helper import helper, source
from schemas.limits import KIB, MIB
from tests.contracts.waiting import soon


@asynccontextmanager
async def helping(name: str) -> AsyncIterator[Process]:
    """A helper that connects to the abstract socket of that name."""
    command = [sys.executable, *helper()[1:-1], f"@{name}"]
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def echoing(name: str) -> AsyncIterator[None]:
    """An agent that says hello and gives everything back."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        while data := await reader.read(64 * KIB):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(talk, f"\0{name}")
    async with server:
        yield


@pytest.fixture
def name() -> str:
    """Of a socket that nobody else has."""
    return f"pigeon-test-{os.getpid()}-{os.urandom(8).hex()}"


async def test_bytes_go_both_ways_unchanged(name: str) -> None:
    """It knows nothing of what it carries, and ends with its input."""
    said = os.urandom(MIB)
    async with echoing(name), helping(name) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert await soon(process.stdout.readexactly(5)) == b"hello"
        process.stdin.write(said)
        assert await soon(process.stdout.readexactly(len(said))) == said
        process.stdin.close()
        assert await soon(process.wait()) == 0


async def test_an_agent_that_is_just_starting_is_waited_for(name: str) -> None:
    """One exec is enough, however early it comes."""
    async with helping(name) as process:
        await asyncio.sleep(0)
        async with echoing(name):
            assert process.stdout is not None
            assert await soon(process.stdout.readexactly(5)) == b"hello"


def test_the_users_programs_cannot_read_it() -> None:
    """The session's key passes through it, and the user inside has the same user id."""
    beginning = source().partition("KIB, PATIENCE")[0]
    asked = "import ctypes; print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE
    program = [sys.executable, "-I", "-S", "-c", beginning + asked]
    assert subprocess.run(program, capture_output=True, check=True).stdout == b"0\n"


def test_it_is_short_enough_for_an_address() -> None:
    """It travels in the query of a request; proxies take 16 KiB of that."""
    assert len(quote("&".join(helper()))) < 8 * KIB
    compile(source(), "helper", "exec", dont_inherit=True)


def test_it_imports_little() -> None:
    """What it loads before it connects is processor time of the pod, at every connection."""
    program = source().partition("KIB, PATIENCE")[0] + "print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, check=True, text=True)
    assert not {"socket", "contextlib", "collections", "json"} & set(loaded.stdout.split())
