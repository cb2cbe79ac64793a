"""Files of the workspace: written, listed, read and deleted, and never anything outside of it."""

from __future__ import annotations

import base64
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.agent import agent as wire
from tests.agent.client import AgentProcess, RequestRefused, Terminal, agent

Json = dict[str, Any]


def file(path: str, data: bytes = b"data", **fields: Any) -> Json:
    """One item of a write."""
    return {"path": path, "type": "file", "data": base64.b64encode(data).decode(), **fields}


def write(terminal: Terminal, *items: Json, id: str = "") -> Json:
    """Write these items."""
    return terminal.control.request("write", id=id or os.urandom(8).hex(), files=list(items))


def read(terminal: Terminal, path: str, **fields: Any) -> bytes:
    """The content of a file."""
    return base64.b64decode(terminal.control.request("read", path=path, **fields)["data"])


def listed(terminal: Terminal, path: str = "", **fields: Any) -> list[str]:
    """The paths below a directory."""
    return [item["path"] for item in terminal.control.request("list", path=path, **fields)["files"]]


def test_files_are_written_whole_with_their_directories(terminal: Terminal) -> None:
    """A pushed tree is there, with modes, before the push is answered."""
    reply = write(
        terminal,
        file("a/b/c.txt", b"\x00\xffbytes"),
        {"path": "empty/dir", "type": "directory"},
        file("run.sh", b"#!/bin/sh\necho ran\n", mode=0o755),
    )
    assert reply["written"] == 3
    assert (terminal.process.workspace / "a/b/c.txt").read_bytes() == b"\x00\xffbytes"
    assert (terminal.process.workspace / "empty/dir").is_dir()
    assert terminal.run("./run.sh")[1] == b"ran\r\n"
    assert listed(terminal) == ["a", "a/b", "a/b/c.txt", "empty", "empty/dir", "run.sh"]
    assert read(terminal, "a/b/c.txt") == b"\x00\xffbytes"


def test_a_write_is_done_once(terminal: Terminal) -> None:
    """A push delivered twice does not undo what happened in between."""
    write(terminal, file("x", b"first"), id="w1")
    (terminal.process.workspace / "x").write_bytes(b"second")
    assert write(terminal, file("x", b"first"), id="w1")["duplicate"] is True
    assert read(terminal, "x") == b"second"


def test_writing_and_running_keep_their_order(terminal: Terminal) -> None:
    """What a connection asks for happens in the order in which it asked."""
    for number in range(20):
        connection = terminal.control.connection
        item = file("f", b"%d" % number * 1_000)
        connection.send_json(wire.REQUEST, 1_000, {"op": "write", "id": f"w{number}", "files": [item]})
        text, command = "head -c 2 f; echo", f"r{number}"
        run = {"op": "run", "number": number + 1, "commandId": command, "text": text}
        connection.send_json(wire.REQUEST, 1_001, run)
        connection.reply(1_000)
        connection.reply(1_001)
        mark = terminal.stream.until_mark("finished", command)
        terminal.stream.until_text(b"\n" + (b"%d" % number * 2)[:2] + b"\r\n", mark["startOffset"] - 2)


@pytest.mark.parametrize(
    "path",
    ["../x", "a/../../x", "/etc/x", "", ".", "a\0b", "..", "x" * 2_000, "/".join("a" * 101), "\ud800", None, 7],
    ids=lambda path: repr(path)[:20],
)
def test_a_path_that_is_not_below_the_workspace_is_refused(terminal: Terminal, path: object) -> None:
    """Neither parents nor absolute paths nor tricks of encoding get anywhere."""
    for operation in (lambda: write(terminal, {**file("x"), "path": path}), lambda: read(terminal, path)):  # type: ignore[arg-type]
        with pytest.raises(RequestRefused) as refused:
            operation()
        assert refused.value.code in ("bad_path", "malformed")
    assert os.listdir(terminal.process.workspace) == []


@pytest.fixture
def outside(terminal: Terminal, tmp_path: Path) -> Path:
    """A directory next to the workspace, with links to it from inside."""
    target = tmp_path / "outside"
    target.mkdir()
    (target / "secret").write_text("secret")
    root = terminal.process.workspace
    (root / "absolute").symlink_to(target)
    (root / "relative").symlink_to("../outside")
    (root / "file").symlink_to("../outside/secret")
    (root / "loop").symlink_to("loop")
    (root / "proc").symlink_to("/proc/self/root")
    return target


@pytest.mark.parametrize("path", ["absolute/secret", "relative/secret", "file", "loop", "loop/x", "proc/etc/passwd"])
def test_no_link_leads_a_read_out(terminal: Terminal, outside: Path, path: str) -> None:
    """A symbolic link in the workspace is not a way to the rest of the machine."""
    with pytest.raises(RequestRefused, match="bad_path"):
        read(terminal, path)


@pytest.mark.parametrize("path", ["absolute/new", "relative/new", "absolute/a/b", "loop/x"])
def test_no_link_leads_a_write_out(terminal: Terminal, outside: Path, path: str) -> None:
    """Neither is it one for writing."""
    with pytest.raises(RequestRefused, match="bad_path"):
        write(terminal, file(path))
    with pytest.raises(RequestRefused, match="bad_path"):
        write(terminal, {"path": path, "type": "delete"})
    assert os.listdir(outside) == ["secret"]


def test_a_link_is_replaced_not_written_through(terminal: Terminal, outside: Path) -> None:
    """Writing to a link's name makes a file of that name; the target stays as it is."""
    write(terminal, file("file", b"mine"), {"path": "absolute", "type": "delete"})
    assert (outside / "secret").read_text() == "secret"
    assert read(terminal, "file") == b"mine"
    assert outside.is_dir()
    assert not (terminal.process.workspace / "absolute").is_symlink()


def test_links_that_stay_inside_are_followed(terminal: Terminal) -> None:
    """A project may link its own directories, relatively or by the workspace's absolute path."""
    root = terminal.process.workspace
    (root / "real/deep").mkdir(parents=True)
    (root / "real/f").write_text("inside")
    (root / "link").symlink_to("real/deep/..")
    (root / "full").symlink_to(root / "real")
    assert read(terminal, "link/f") == read(terminal, "full/f") == b"inside"
    write(terminal, file("link/new"))
    assert (root / "real/new").exists()


def test_what_is_no_regular_file_is_not_read(terminal: Terminal) -> None:
    """A FIFO, a socket, a directory or a device does not make the agent wait."""
    root = terminal.process.workspace
    os.mkfifo(root / "fifo")
    (root / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(root / "socket"))
        for path in ("fifo", "directory", "socket"):
            with pytest.raises(RequestRefused):
                read(terminal, path)
    write(terminal, file("fifo", b"now a file"))
    assert read(terminal, "fifo") == b"now a file"
    assert terminal.run("true")[0]["exitCode"] == 0


def test_refusals_have_names(terminal: Terminal) -> None:
    """Each way in which a request fails has its own code, and names the path."""
    root = terminal.process.workspace
    (root / "d").mkdir()
    (root / "big").write_bytes(b"x" * 101)
    cases: list[tuple[str, Json]] = [
        ("not_found", {"op": "read", "path": "nosuch"}),
        ("not_found", {"op": "list", "path": "nosuch"}),
        ("bad_path", {"op": "read", "path": "big/x"}),
        ("not_a_file", {"op": "read", "path": "d"}),
        ("too_large", {"op": "read", "path": "big", "limit": 100}),
        ("malformed", {"op": "read", "path": "big", "limit": 10**9}),
        ("malformed", {"op": "write", "id": "1", "files": [{"path": "x", "type": "magic"}]}),
        ("malformed", {"op": "write", "id": "1", "files": [{"path": "x", "data": "not base64!"}]}),
        ("malformed", {"op": "write", "id": "1", "files": [{"path": "x", "data": "", "mode": 0o7777}]}),
        ("malformed", {"op": "write", "id": "1", "files": "x"}),
        ("not_a_file", {"op": "write", "id": "1", "files": [{"path": "d", "data": ""}]}),
        ("bad_path", {"op": "write", "id": "1", "files": [{"path": "big/x", "data": ""}]}),
        ("bad_path", {"op": "write", "id": "1", "files": [7]}),
        ("unknown_op", {"op": "magic"}),
        ("malformed", {"op": 7}),
        ("malformed", {"op": "input", "data": ""}),
        ("malformed", {"op": "resize", "id": "1", "rows": 0, "cols": 80}),
        ("malformed", {"op": "signal", "id": "1", "name": "STOP"}),
        ("malformed", {"op": "run", "number": 1, "commandId": "a", "text": "a\0b"}),
        ("malformed", {"op": "run", "number": 1, "commandId": "a", "text": "a", "timeoutSeconds": -1}),
    ]
    for code, request in cases:
        with pytest.raises(RequestRefused) as refused:
            terminal.control.request(**request)
        assert refused.value.code == code, request
    assert sorted(os.listdir(root)) == ["big", "d"]


def test_the_first_refusal_stops_a_write(terminal: Terminal) -> None:
    """The reply says how far it got and what was wrong."""
    with pytest.raises(RequestRefused) as refused:
        write(terminal, file("one"), file("../two"), file("three"))
    assert (refused.value.code, refused.value.reply["path"], refused.value.reply["written"]) == (
        "bad_path",
        "../two",
        1,
    )
    assert listed(terminal) == ["one"]


def test_trees_are_deleted_without_following_links(terminal: Terminal, outside: Path) -> None:
    """A deleted directory takes its links with it, not what they point at; what is gone already is no error."""
    root = terminal.process.workspace
    (root / "tree/a").mkdir(parents=True)
    (root / "tree/out").symlink_to(outside)
    (root / "tree/a/f").write_text("")
    assert write(terminal, {"path": "tree", "type": "delete"}, {"path": "tree", "type": "delete"})["written"] == 2
    assert not (root / "tree").exists()
    assert (outside / "secret").exists()


def test_a_tree_deeper_than_any_path_is_deleted(terminal: Terminal) -> None:
    """Hundreds of nested directories, as user code can make them, use up neither stack nor descriptors."""
    script = "import os\nfor _ in range(400): os.mkdir('d'); os.chdir('d')"
    assert terminal.run(f"python3 -c {wire.quoted(script)}")[0]["exitCode"] == 0
    assert terminal.control.request("list")["truncated"] is False
    write(terminal, {"path": "d", "type": "delete"})
    assert listed(terminal) == []


def test_listings_are_bounded_and_in_order(terminal: Terminal) -> None:
    """Depth first, sorted by name, with kinds; a limit cuts it and says so."""
    root = terminal.process.workspace
    (root / "b").mkdir()
    (root / "b/x").write_text("123")
    (root / "a").symlink_to("b")
    os.mkfifo(root / "c")
    (root / os.fsdecode(b"\xff")).write_text("")
    reply = terminal.control.request("list")
    assert [(item["path"], item["type"]) for item in reply["files"]] == [
        ("a", "symlink"),
        ("b", "directory"),
        ("b/x", "file"),
        ("c", "other"),
        ("\ufffd", "file"),
    ]
    assert reply["files"][2]["size"] == 3
    assert terminal.control.request("list", path="b")["files"][0]["path"] == "b/x"
    cut = terminal.control.request("list", limit=2)
    assert (len(cut["files"]), cut["truncated"]) == (2, True)


def test_changed_files_are_told_with_the_command(terminal: Terminal) -> None:
    """A finished mark names what the command created, modified and deleted, and nothing that others did."""
    write(terminal, file("same"), file("edit"), file("gone"), file("dir/x"))
    mark, _ = terminal.run("echo more >>edit; rm gone; mkdir -p new/sub; touch new/sub/f; mv dir/x dir/y")
    assert mark["changed"] == [
        {"path": "dir/x", "change": "deleted"},
        {"path": "dir/y", "change": "created"},
        {"path": "edit", "change": "modified"},
        {"path": "gone", "change": "deleted"},
        {"path": "new", "change": "created"},
        {"path": "new/sub", "change": "created"},
        {"path": "new/sub/f", "change": "created"},
    ]
    write(terminal, file("pushed"))
    assert terminal.run("true")[0]["changed"] == []


def test_changed_files_are_bounded(terminal: Terminal) -> None:
    """At most 200 are named, and the mark says that there are more."""
    mark, _ = terminal.run("touch {1..300}")
    assert (len(mark["changed"]), mark["changedTruncated"]) == (200, True)


MANY_LONG_NAMES = """
import os
for _ in range(40):
    os.mkdir(b"\\xff" * 250)
    os.chdir(b"\\xff" * 250)
for number in range(300):
    open(b"%03d" % number + b"\\xff" * 250, "w").close()
"""


def test_however_long_their_paths_changed_files_fit_a_document(terminal: Terminal) -> None:
    """A mark that no document, or no frame, can hold would be sent again and again, and nothing after it."""
    mark, _ = terminal.run(f"python3 -c {wire.quoted(MANY_LONG_NAMES)}")
    assert mark["exitCode"] == 0
    assert mark["changedTruncated"] is True
    assert 0 < len(json.dumps(mark["changed"])) < 300 * 1024


def test_however_long_its_paths_a_listing_fits_a_frame(terminal: Terminal) -> None:
    """It is cut, and says so; one that is too long would end the connection, each time it is asked for."""
    assert terminal.run(f"python3 -c {wire.quoted(MANY_LONG_NAMES)}")[0]["exitCode"] == 0
    reply = terminal.control.request("list")
    assert reply["truncated"] is True
    assert len(json.dumps(reply)) < wire.MAX_PAYLOAD


def test_a_workspace_of_endless_paths_is_not_looked_through(terminal: Terminal) -> None:
    """What the agent remembers of a workspace is bounded in bytes too: it shares its memory with the user."""
    assert terminal.run(f"python3 -c {wire.quoted(MANY_LONG_NAMES.replace('300', '1000'))}")[0]["exitCode"] == 0
    mark, _ = terminal.run("touch one")
    assert (mark["changed"], mark["changedTruncated"]) == ([], True)


def test_a_huge_workspace_is_not_looked_through(small_scan_process: AgentProcess) -> None:
    """Past a number of files the looking stops, and the mark says so."""
    terminal = Terminal(small_scan_process)
    terminal.run("mkdir many; cd many; touch {1..400}; cd ..")
    mark, _ = terminal.run("touch one")
    assert (mark["changed"], mark["changedTruncated"]) == ([], True)


def test_the_run_directory_is_not_the_users(tmp_path: Path) -> None:
    """Where the agent's own directory lies in the workspace it is neither listed nor a change."""
    (tmp_path / "w" / "run").mkdir(parents=True)
    with agent(tmp_path, "--run-dir", str(tmp_path / "w" / "run")) as process:
        terminal = Terminal(process)
        assert terminal.run("touch f")[0]["changed"] == [{"path": "f", "change": "created"}]
        assert listed(terminal) == ["f"]


def test_output_goes_on_while_files_are_worked_on(terminal: Terminal) -> None:
    """A long listing is done in slices; the terminal answers in between."""
    terminal.run("mkdir many; cd many; touch {1..3000}; cd ..")
    reader, second = terminal.process.control(), terminal.control
    for request in range(5):
        reader.connection.send_json(wire.REQUEST, request, {"op": "list"})
    for _ in range(20):
        assert second.request("status")["state"] == "idle"
    assert len(reader.connection.reply(0)["files"]) == 3_001


@given(st.text(max_size=30) | st.sampled_from(["a/../b", "./a", "a//b", "..a", "a/..", "..."]))
def test_a_path_is_taken_apart_or_refused(path: str) -> None:
    """Whatever the text, what comes out has no component that means anything special."""
    try:
        parts = wire.split_path(path)
    except wire.Refused:
        return
    assert parts
    assert not {"", ".", ".."} & set(parts)
    assert not any("/" in part or "\0" in part for part in parts)
