"""The command `pigeon`. Each subcommand's work is in a module of its own, imported when it is called."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, NoReturn

import typer

from infra.cli.printable import printable
from schemas.errors import PigeonError

TERMINATED = 143  # 128 + SIGTERM, as shells say it

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="An event-driven Python terminal. The stack is found by PIGEON_STATE (default .pigeon), or, elsewhere,"
    " by --url and the access token in PIGEON_TOKEN.",
)

Url = Annotated[str, typer.Option("--url", envvar="PIGEON_URL", help="The functions' address, for a remote stack.")]
User = Annotated[str, typer.Option("--user", "-u", help="Whose sessions, on this machine.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
SessionId = Annotated[
    str, typer.Argument(metavar="ID", help="A session's id, or its first letters.", show_default=False)
]

LOCAL_USER = "local"  # whose page `pigeon up` opens


def main() -> None:
    """The entry point. Errors are one line on stderr with their stable code."""
    try:
        app()
    except PigeonError as error:
        fail(error)
    except OSError as error:
        fail(PigeonError(f"{error.strerror}: {error.filename}" if error.filename else str(error)), "os_error")


def fail(error: PigeonError, code: str = "") -> NoReturn:
    """End the process with the error in one line."""
    typer.echo(f"pigeon: {printable(str(error))} [{code or error.code}]", err=True)
    raise SystemExit(1)


def finish(work: Callable[[], Coroutine[Any, Any, int]]) -> NoReturn:
    """Run a subcommand's work and exit with the status it returns. A reader that has gone away is no error."""
    try:
        status = asyncio.run(work())
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit is quiet too
        status = 1
    except asyncio.CancelledError:
        status = TERMINATED
    raise typer.Exit(status)


@app.command()
def up(
    port: Annotated[int | None, typer.Option(help="On 127.0.0.1; 0 picks a free one.", min=0, max=65535)] = None,
    roles: Annotated[str, typer.Option(help="Which parts run in this process.")] = "gateway,worker,ticker",
) -> None:
    """Start everything on this machine, until Ctrl-C."""
    from infra.cli.start import start

    raise typer.Exit(start(port, roles, LOCAL_USER))


@app.command()
def worker() -> None:
    """Work on a deployment's sessions, until SIGTERM; PIGEON_* variables say where they are."""
    from infra.cli.start import start_worker

    raise typer.Exit(start_worker())


@app.command()
def demo() -> None:
    """A scripted session, checked step by step."""
    from infra.cli.demo import demo

    finish(demo)


@app.command(context_settings={"ignore_unknown_options": True})
def run(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A script, or - for standard input.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGUMENTS]...", help="For the script.")] = None,
    timeout: Annotated[int | None, typer.Option(help="Seconds the script may take.", min=1)] = None,
    url: Url = "",
    user: User = LOCAL_USER,
) -> None:
    """Run a script in a new session and exit with its exit code.

    bash runs it if its name ends in .sh or its first line says so, python3 otherwise; its standard input is empty.
    Its output comes to stdout, unchanged. A script that is killed gives 124, one that is lost 125; Ctrl-C ends it.
    """
    from infra.cli.common import connect
    from infra.cli.run import Script, run

    async def work() -> int:
        script = Script.read(file, tuple(arguments or ()))
        async with connect(url, user) as client:
            return await run(client, script, timeout)

    finish(work)


@app.command()
def sessions(
    all: Annotated[bool, typer.Option("--all", "-a", help="Ended ones too.")] = False,
    url: Url = "",
    user: User = LOCAL_USER,
    json: Json = False,
) -> None:
    """List sessions, newest first."""
    from infra.cli.common import connect, print_sessions

    async def work() -> int:
        async with connect(url, user) as client:
            return print_sessions(await client.sessions(live=not all), ended=all, as_json=json)

    finish(work)


@app.command()
def tail(
    session: SessionId,
    url: Url = "",
    user: User = LOCAL_USER,
) -> None:
    """Print a session's transcript from its start, and what follows until it ends."""
    from infra.cli.common import connect, find_session
    from infra.cli.tail import tail

    async def work() -> int:
        async with connect(url, user) as client:
            return await tail(client, await find_session(client, session))

    finish(work)


@app.command()
def attach(
    session: Annotated[str, typer.Argument(metavar="[ID]", help="By default the newest live one, or a new one.")] = "",
    url: Url = "",
    user: User = LOCAL_USER,
) -> None:
    """Use a session in this terminal. Ctrl-C goes to the session; ~. at the start of a line leaves it running."""
    from infra.cli.attach import attach
    from infra.cli.common import connect

    async def work() -> int:
        async with connect(url, user) as client:
            return await attach(client, session)

    finish(work)


@app.command()
def close(session: SessionId, url: Url = "", user: User = LOCAL_USER, json: Json = False) -> None:
    """End a session. Its transcript stays."""
    from infra.cli.common import connect, find_session, print_closed

    async def work() -> int:
        async with connect(url, user) as client:
            return print_closed(await client.close(await find_session(client, session)), as_json=json)

    finish(work)


@app.command("open")
def open_page(user: User = LOCAL_USER) -> None:
    """Print a fresh address of this machine's page; it works once."""
    from infra.cli.common import connect

    async def work() -> int:
        async with connect("", user) as client:
            typer.echo(await client.address())
        return 0

    finish(work)


@app.command()
def token(
    user: User = LOCAL_USER,
    hours: Annotated[float, typer.Option(help="How long it is good for.", min=0.01, max=24 * 30)] = 1.0,
) -> None:
    """Print an access token for this machine's stack."""
    from infra.cli.common import local_token

    typer.echo(local_token(user, hours))
