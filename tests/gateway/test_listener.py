"""The gateway's socket."""

from __future__ import annotations

import asyncio
import socket

import pytest

from infra.local.up import PortInUse, listen


async def test_what_the_gateway_writes_is_sent_at_once() -> None:
    """An answer is written in two pieces; the second does not wait for the client to acknowledge the first."""
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    with listen(0) as listener:
        async with await asyncio.start_server(serve, sock=listener):
            _, client = await asyncio.open_connection(*listener.getsockname())
            assert await asyncio.wait_for(accepted, 10)
            client.close()
            await client.wait_closed()


def test_a_port_in_use_is_named() -> None:
    """A person who starts a second stack learns which port is taken and what to do."""
    with listen(0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortInUse, match=f"port {port}"):
            listen(port)
