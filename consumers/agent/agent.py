"""The agent inside a sandbox: one shell on one PTY, whose output is kept until it is committed.

This one file runs in the sandbox, as PID 1 where there is a PID namespace; it needs Python 3.8 and nothing else.
`serve` is the agent, `attach` and `control` are what a worker execs to reach its Unix socket. The worker imports the
wire format (frames, limits, proofs) from here, so importing this module has no effects. docs/agent-protocol.md says
what travels; the classes below are, in order, the wire, the transcript, the terminal, the files, the commands, the
connections and the loop.

What only the agent needs (json, hashlib, re below them) is imported where it is used: a helper is a small process.

Start it as `python3 -I -S agent.py ...`, so that nothing a user leaves in a directory or a variable is imported.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import heapq
import itertools
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
import termios
import time

TYPE_CHECKING = False  # typing costs milliseconds of every helper's start
if TYPE_CHECKING:
    from typing import Any, Callable, Deque, Dict, Generator, List, Optional, Sequence, Set, Tuple, Union

    Json = Dict[str, Any]
    Job = Generator[None, None, Any]
    Piece = Union[bytes, "ShellMark"]
    Entry = Tuple[str, os.stat_result]
    Signature = Tuple[int, int, int]

VERSION = 1
KIB = 1024
MIB = 1024 * KIB

HEADER = struct.Struct("!BIQ")  # type, payload length, argument
HELLO, OUT, ECHO, GAP, MARK, REPLY, STATUS, END = range(1, 9)
PING, PONG = 9, 10
OPEN, ATTACH, CONTROL, ACK, ACKMARK, REQUEST = range(65, 71)

MAX_PAYLOAD = 8 * MIB  # bytes, of any frame
MAX_OUT_BYTES = 64 * KIB  # of one OUT or ECHO frame
MAX_STRANGER_BYTES = 256 * KIB  # of one frame before its sender has proved anything; OPEN may carry an environment
DEFAULT_SPOOL_BYTES = 8 * MIB
DEFAULT_OUTPUT_BYTES = 64 * MIB
MAX_INPUT_QUEUE_BYTES = 1 * MIB
MAX_WAITING_COMMANDS = 1_000
MAX_WAITING_BYTES = 16 * MIB  # of the text of waiting commands
MAX_REMEMBERED_IDS = 4_096
MAX_CHANGED_FILES = 200
MAX_CHANGED_BYTES = 256 * KIB  # of them in one mark, as JSON: it is recorded in a document, which holds 1 MiB
MAX_SCANNED_FILES = 20_000
MAX_SCANNED_BYTES = 8 * MIB  # of the paths in one snapshot, which is kept in memory
MAX_LISTED_FILES = 10_000
MAX_LISTED_BYTES = 4 * MIB  # of one listing, as JSON, so that the reply fits a frame
MAX_READ_BYTES = 4 * MIB
MAX_PATH_BYTES = 1_024
MAX_PATH_DEPTH = 100  # a walk holds one descriptor a level
MAX_STRANGERS = 32  # connections that have proved nothing yet
MAX_REFUSALS = 3  # of one stranger's claims, then it is closed
STRANGER_READ_BYTES = 16 * KIB  # at once, so that no flood of frames holds the terminal up
MAX_PENDING_BYTES = 256 * KIB  # queued for one connection before it is read no further
MAX_START_ATTEMPTS = 3
MAX_SHOWN_BYTES = 8 * KIB  # of a command's text in the transcript
MAX_HISTORY_BYTES = 16 * KIB  # longer texts are not added to the shell's history
ECHO_SECONDS = 0.05  # output this soon after input is what a person waits for
HOLD_SECONDS = 0.02  # how long the start of something that may be our mark is held back
ECHO_HOLD_SECONDS = 0.5  # how long the start of what may be the echo of our own typing is held back
SETTLE_SECONDS = 0.1  # how long a prompt must stay when lines were typed ahead of it
PRESUME_SECONDS = 1.0  # after which an interrupt at the prompt that brought no new prompt has left it as it was
START_SECONDS = 3.0  # after which a line that did not start is typed again, and input no longer waits for a prompt
ESCALATION_SECONDS = 2.0  # between INT, TERM and KILL
GAP_SECONDS = 10.0  # how often discarded output is told of while it goes on
SCAN_PAUSE_SECONDS = 30.0  # after a workspace turned out too big to be scanned
SLICE_SECONDS = 0.003  # how long work on files may hold the loop up
OUTPUT_BUDGET = "output_budget"


class ProtocolError(Exception):
    """The other side sent something that is no frame; the connection cannot go on."""


class Refused(Exception):
    """A request that was not carried out and changed nothing; `code` is stable, `details` go with the reply."""

    def __init__(self, code: str, message: str, **details: object) -> None:
        super().__init__(message)
        self.code = code
        self.details = details


# The wire ----------------------------------------------------------------------------------------


def encode_frame(kind: int, argument: int = 0, payload: bytes = b"") -> bytes:
    """One frame: header and payload."""
    return HEADER.pack(kind, len(payload), argument) + payload


def encode_json(value: Json) -> bytes:
    """Compact JSON in ASCII, which any payload may be cut and logged as."""
    import json

    return json.dumps(value, separators=(",", ":")).encode("ascii")


def decode_json(payload: bytes) -> Json:
    """The object in a payload. Raises ProtocolError if it is none."""
    import json

    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("broken JSON") from error
    if not isinstance(value, dict):
        raise ProtocolError("not a JSON object")
    return value


def attach_proof(key: bytes, challenge: str, epoch: int, offset: int, mark: Optional[int]) -> str:
    """What an ATTACH from `offset` and after `mark` (None: the oldest mark kept) proves the key with."""
    return _hmac(key, "{}:attach:{}:{}:{}".format(challenge, epoch, offset, "" if mark is None else mark))


def control_proof(key: bytes, challenge: str) -> str:
    """What a CONTROL proves the key with."""
    return _hmac(key, "{}:control".format(challenge))


def same(secret: str, claimed: str) -> bool:
    """Whether two texts are equal, in a time that does not tell where they differ."""
    import hmac

    return hmac.compare_digest(secret.encode("utf-8", "replace"), claimed.encode("utf-8", "replace"))


def _hmac(key: bytes, text: str) -> str:
    import hashlib
    import hmac

    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


class FrameDecoder:
    """Bytes in, frames out, however the stream is cut. Holds one incomplete frame at most."""

    def __init__(self, limit: int = MAX_PAYLOAD) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Generator[Tuple[int, int, bytes], None, None]:
        """Take what arrived; iterate over the frames completed by it as (type, argument, payload).

        What is not consumed is kept. Raises ProtocolError for a payload longer than the limit.
        """
        self._buffer += data
        return self.frames()

    def frames(self) -> Generator[Tuple[int, int, bytes], None, None]:
        """The complete frames that are buffered, each taken out before it is yielded."""
        taken = 0
        try:
            while len(self._buffer) - taken >= HEADER.size:
                kind, length, argument = HEADER.unpack_from(self._buffer, taken)
                if length > self.limit:
                    raise ProtocolError("a payload of {} bytes".format(length))
                if len(self._buffer) - taken - HEADER.size < length:
                    return
                start = taken + HEADER.size
                taken = start + length
                yield kind, argument, bytes(self._buffer[start:taken])
        finally:
            del self._buffer[:taken]


# The transcript ----------------------------------------------------------------------------------


class Gap:
    """Bytes that were given up: they have offsets and no content."""

    __slots__ = ("length", "reason")

    def __init__(self, length: int, reason: str) -> None:
        self.length = length
        self.reason = reason

    def __len__(self) -> int:
        return self.length

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Gap) and (self.length, self.reason) == (other.length, other.reason)

    def __repr__(self) -> str:
        return "Gap({}, {!r})".format(self.length, self.reason)


class Spool:
    """The transcript from the first uncommitted byte to its end: runs of bytes and gaps, in memory.

    `start` and `end` are offsets; `held` is the number of bytes kept, gaps not counted.
    """

    COALESCE = 4 * KIB  # small runs are joined, so that a million key echoes are not a million objects

    def __init__(self) -> None:
        self.start = self.end = self.held = 0
        self._starts: List[int] = []
        self._runs: List[Union[bytes, Gap]] = []

    def append(self, data: bytes) -> None:
        """Add bytes at the end."""
        if not data:
            return
        last = self._runs[-1] if self._runs else None
        if isinstance(last, bytes) and len(last) + len(data) <= self.COALESCE:
            self._runs[-1] = last + data
        else:
            self._starts.append(self.end)
            self._runs.append(data)
        self.end += len(data)
        self.held += len(data)

    def append_gap(self, length: int, reason: str) -> None:
        """Let the end advance by bytes that nobody keeps; adjacent gaps of one reason are one."""
        last = self._runs[-1] if self._runs else None
        if isinstance(last, Gap) and last.reason == reason:
            self._runs[-1] = Gap(last.length + length, reason)
        else:
            self._starts.append(self.end)
            self._runs.append(Gap(length, reason))
        self.end += length

    def read(self, offset: int, limit: int) -> Union[memoryview, Gap]:
        """What is kept from `offset` on: at most `limit` bytes of one run, or the rest of a gap.

        Raises IndexError outside start <= offset < end.
        """
        if not self.start <= offset < self.end:
            raise IndexError(offset)
        index = self._find(offset)
        run, skipped = self._runs[index], offset - self._starts[index]
        if isinstance(run, Gap):
            return Gap(run.length - skipped, run.reason)
        return memoryview(run)[skipped : skipped + limit]

    def ack(self, offset: int) -> None:
        """Forget every byte before `offset`, which is at most the end; an older offset changes nothing."""
        if offset <= self.start:
            return
        whole = self._find(offset)
        self.held -= sum(len(run) for run in self._runs[:whole] if isinstance(run, bytes))
        del self._runs[:whole], self._starts[:whole]
        self._cut_first(offset)
        self.start = offset

    def _cut_first(self, offset: int) -> None:
        run, cut = self._runs[0], offset - self._starts[0]
        if cut == len(run):
            del self._runs[0], self._starts[0]
        elif isinstance(run, Gap):
            self._runs[0], self._starts[0] = Gap(run.length - cut, run.reason), offset
        else:
            self._runs[0], self._starts[0] = run[cut:], offset
        if not isinstance(run, Gap):
            self.held -= cut

    def _find(self, offset: int) -> int:
        low, high = 0, len(self._starts) - 1
        if high < 0 or offset >= self._starts[high]:
            return high
        while low < high:
            middle = (low + high + 1) // 2
            if self._starts[middle] <= offset:
                low = middle
            else:
                high = middle - 1
        return low


class StreamMark:
    """Something that happened at an offset of the transcript, as it is sent."""

    __slots__ = ("offset", "payload", "sequence")

    def __init__(self, sequence: int, offset: int, payload: bytes) -> None:
        self.sequence = sequence
        self.offset = offset
        self.payload = payload


class Transcript:
    """The spool, the budget that bounds it, and the marks that belong to it. Knows no connection.

    Marks have sequences of their own (from 1) and are kept until acked. Discarded bytes become part of the stream
    when `settle_gap` is called, so that a flood makes few gaps.
    """

    def __init__(self, budget: int = DEFAULT_OUTPUT_BYTES) -> None:
        self.spool = Spool()
        self.budget = budget
        self.discarded = 0
        self.unsettled = 0  # discarded bytes that the stream does not show yet
        self.marks: Deque[StreamMark] = collections.deque()
        self.last_mark = 0
        self.echo_start = self.echo_end = 0  # the newest stretch that somebody waits for

    @property
    def end(self) -> int:
        """The offset after the last byte."""
        return self.spool.end

    def write(self, data: bytes, urgent: bool = False) -> None:
        """Add what the terminal printed; what is beyond the budget is counted and thrown away."""
        room = self.budget - (self.spool.end - self.discarded + self.unsettled)
        if len(data) > room:
            self._discard(len(data) - max(room, 0))
            data = data[: max(room, 0)]
        if urgent and data:
            if self.echo_end != self.spool.end:
                self.echo_start = self.spool.end
            self.echo_end = self.spool.end + len(data)
        self.spool.append(data)

    def _discard(self, count: int) -> None:
        self.discarded += count
        self.unsettled += count

    def settle_gap(self) -> None:
        """Make what was discarded so far part of the stream."""
        if self.unsettled:
            self.spool.append_gap(self.unsettled, OUTPUT_BUDGET)
            self.unsettled = 0

    def mark(self, kind: str, **fields: object) -> None:
        """Add a mark; its offset is the field of that name, else the end."""
        self.settle_gap()
        fields.setdefault("offset", self.end)
        offset = fields["offset"]
        assert isinstance(offset, int)
        self.last_mark += 1
        self.marks.append(StreamMark(self.last_mark, offset, encode_json(dict(fields, kind=kind))))

    @property
    def first_mark(self) -> int:
        """The sequence of the first mark that is kept, or of the next one."""
        return self.last_mark + 1 - len(self.marks)

    def ack_marks(self, sequence: int) -> None:
        """Forget every mark up to `sequence`."""
        while self.marks and self.marks[0].sequence <= sequence:
            self.marks.popleft()

    def is_echo(self, offset: int) -> bool:
        """Whether the byte at `offset` was printed while somebody waited for it."""
        return self.echo_start <= offset < self.echo_end

    @property
    def settled(self) -> bool:
        """Whether all of it, marks included, has been acked."""
        return self.spool.start == self.spool.end and not self.marks and not self.unsettled


class ShellMark:
    """One of our own marks, taken out of the terminal's output."""

    __slots__ = ("fields",)

    def __init__(self, body: bytes) -> None:
        self.fields = body.decode("latin-1").split(";")

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShellMark) and self.fields == other.fields

    def __repr__(self) -> str:
        return "ShellMark({!r})".format(self.fields)


class MarkFilter:
    """Takes our marks out of the terminal's output, and the echo of what the agent typed: bytes in, pieces out.

    A mark is `ESC ] 133 ; NONCE ; body BEL`. What may be the start of one at the end of the input is held back until
    the next input or `release`. A mark whose start was released is still found; CAN then ends the broken sequence
    on the reader's screen.
    """

    BODY = 64  # bytes; a longer one is not ours
    CANCEL = b"\x18"

    def __init__(self, nonce: str) -> None:
        self._prefix = b"\x1b]133;" + nonce.encode() + b";"
        self._tail = b""
        self._released = 0  # bytes of the tail that are out already
        self._echoes: Deque[Tuple[bytes, bytes]] = collections.deque()

    @property
    def held(self) -> int:
        """How many bytes wait for what follows them."""
        return len(self._tail) - self._released

    @property
    def unseen(self) -> int:
        """How many of the expected echoes have not come yet."""
        return len(self._echoes)

    def expect(self, *echoes: Tuple[bytes, bytes]) -> None:
        """From now on, replace the first occurrence of each (echo, replacement), in this order, until `expect()`."""
        self._echoes = collections.deque(echoes)

    def feed(self, data: bytes) -> List[Piece]:
        """The pieces of the stream up to what must be held back."""
        if not self._tail and not self._echoes and data.find(b"\x1b") < 0:
            return [data]
        pieces: List[Piece] = []
        data, self._tail = self._tail + data, b""
        released, self._released = self._released, 0
        at = self._scan(data, released, pieces)
        self._tail = data[at:]
        self._released = max(0, released - at)
        return pieces

    def release(self) -> bytes:
        """Give out what is held back: nothing followed it in time. Marks are still recognised afterwards."""
        tail = self._tail[self._released :]
        if self._prefix.startswith(self._tail[: len(self._prefix)]):
            self._released = len(self._tail)
        else:
            self._tail, self._released = b"", 0
        return tail

    def _scan(self, data: bytes, released: int, pieces: List[Piece]) -> int:
        """Append what `data` consists of; returns where the part begins that has to wait."""
        at = search = 0
        while True:
            found, length, replacement = self._next(data, search)
            if length < 0:  # an incomplete one, or the end
                self._emit(data, max(at, released), found, pieces)
                return found
            if length == 0:  # looked like a mark and is none
                search = found + 1
                continue
            self._emit(data, max(at, released), found, pieces)
            if found < released:
                pieces.append(self.CANCEL)
            if replacement:
                pieces.append(replacement)
            at = search = found + length

    @staticmethod
    def _emit(data: bytes, start: int, end: int, pieces: List[Piece]) -> None:
        if start < end:
            pieces.append(data[start:end])

    def _next(self, data: bytes, start: int) -> Tuple[int, int, Piece]:
        """The first thing of ours at or after `start`: where, how long (0: none after all, -1: incomplete), what."""
        mark = data.find(self._prefix, start)
        echo = data.find(self._echoes[0][0], start) if self._echoes else -1
        if echo >= 0 and (mark < 0 or echo < mark):
            text, replacement = self._echoes.popleft()
            return echo, len(text), replacement
        if mark >= 0:
            return self._mark_at(data, mark)
        return self._incomplete(data, start), -1, b""

    def _mark_at(self, data: bytes, mark: int) -> Tuple[int, int, Piece]:
        body = mark + len(self._prefix)
        end = data.find(b"\x07", body, body + self.BODY)
        if end >= 0:
            return mark, end + 1 - mark, ShellMark(data[body:end])
        return mark, (0 if len(data) >= body + self.BODY else -1), b""

    def _incomplete(self, data: bytes, start: int) -> int:
        """Where a suffix of `data` begins that may become something of ours, else its length."""
        patterns = [self._prefix] + [echo for echo, _ in itertools.islice(self._echoes, 1)]
        held = len(data)
        for pattern in patterns:
            at = data.find(pattern[:1], max(start, len(data) - len(pattern) + 1))
            while 0 <= at < held:
                if pattern.startswith(data[at:]):
                    held = at
                at = data.find(pattern[:1], at + 1)
        return held


# The terminal ------------------------------------------------------------------------------------

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
IUTF8 = 0o40000  # termios does not export it
SIGNALS = {"INT": signal.SIGINT, "TERM": signal.SIGTERM, "KILL": signal.SIGKILL, "QUIT": signal.SIGQUIT}


def prctl(option: int, value: int) -> None:
    """prctl(2); a kernel that refuses it is left alone, since every use here is a second line of defence."""
    import ctypes

    ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def descendants(root: int) -> List[int]:
    """Every living process below `root`, as /proc shows it now."""
    children: Dict[int, List[int]] = collections.defaultdict(list)
    for name in os.listdir("/proc"):
        state, parent = process_state(int(name)) if name.isdigit() else ("", -1)
        if state not in ("", "Z"):
            children[parent].append(int(name))
    found, queue = [], list(children[root])
    while queue:
        pid = queue.pop()
        found.append(pid)
        queue.extend(children[pid])
    return found


def process_state(pid: int) -> Tuple[str, int]:
    """A process's state and its parent's pid (0: outside of this PID namespace); ("", -1) if there is none."""
    try:
        with open("/proc/{}/stat".format(pid), "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[1])
    except (OSError, ValueError, IndexError):
        return "", -1


def kill_descendants(rounds: int) -> None:
    """Kill whatever runs below this process, again and again while it forks faster."""
    for _ in range(rounds):
        pids = descendants(os.getpid())
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


class Shell:
    """Which shell runs, and what it is told so that it marks its prompts and commands.

    `nonce` is in every mark. It is made of digits, which no setting of the terminal changes.
    """

    def __init__(self, path: str, nonce: str, run_dir: str) -> None:
        self.path = path
        self.is_bash = os.path.basename(path) == "bash"
        self.nonce = nonce
        self.run_dir = run_dir
        self.rc = os.path.join(run_dir, "rc")

    @classmethod
    def find(cls, nonce: str, run_dir: str) -> Shell:
        """The system's bash, or its sh."""
        for path in ("/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash"):
            if os.access(path, os.X_OK):
                return cls(path, nonce, run_dir)
        return cls("/bin/sh", nonce, run_dir)

    def prepare(self) -> None:
        """Write the file that the shell reads at its start."""
        with contextlib.suppress(OSError):
            os.unlink(self.rc)
        write_private(self.rc, (_BASH_RC if self.is_bash else _SH_RC).replace("NONCE", self.nonce).encode())

    def argv(self) -> List[str]:
        """The shell's arguments."""
        return [self.path, "--noprofile", "--rcfile", self.rc, "-i"] if self.is_bash else [self.path, "-i"]

    def environment(self, workspace: str, extra: Dict[str, str]) -> Dict[str, str]:
        """The agent's environment, a terminal's variables, and what OPEN gave."""
        env = dict(os.environ, HOME=workspace, PWD=workspace, TERM="xterm-256color", SHELL=self.path)
        env.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        env.setdefault("LANG", "C.UTF-8")
        env.update(extra)
        if not self.is_bash:
            env["ENV"] = self.rc
        return env

    def script(self, number: int, text: str) -> str:
        """Write what sources as command `number`; returns the file's path.

        The text is evaluated on the first line, so that the shell's messages count lines as the user does. Before
        that the shell creates the file's claim, which only one can: what has started is never started again, nor what
        `withhold` claimed.
        """
        path = self._path(number)
        data = text.encode("utf-8", "replace")  # JSON may carry half a surrogate pair
        os.makedirs(self.run_dir, 0o700, exist_ok=True)
        self.forget(number)
        if self.has_started(number):
            raise FileExistsError(path)  # somebody put something there that cannot be removed
        if self.is_bash:
            write_private(path + ".text", data if len(data) <= MAX_HISTORY_BYTES else b"")
        script = _BASH_SCRIPT if self.is_bash else _SH_SCRIPT
        script = script.format(number=number, path=quoted(path), text=quoted(data.decode()))
        write_private(path, script.encode("utf-8", "surrogateescape"))
        return path

    def _path(self, number: int) -> str:
        return os.path.join(self.run_dir, str(number))

    def forget(self, number: int) -> None:
        """Remove what `script` and the shell wrote."""
        self._remove(number, "", ".text", ".status", ".claim")

    def withhold(self, number: int) -> bool:
        """Keep the script of command `number` from starting, even where a shell has read it already; False if it has
        started. The claim stays."""
        try:
            write_private(self._path(number) + ".claim", b"")
        except FileExistsError:
            return False
        except OSError:
            pass  # the shell cannot create one either
        self._remove(number, "", ".text", ".status")
        return True

    def _remove(self, number: int, *suffixes: str) -> None:
        for suffix in suffixes:
            with contextlib.suppress(OSError):
                os.unlink(self._path(number) + suffix)

    def status(self, number: int) -> Optional[int]:
        """The exit code that the script of command `number` noted, if it got so far. A ^C at the wrong moment makes
        the terminal forget what was not read yet, and the shell then marks the next prompt with the ^C's own code."""
        try:
            fd = os.open(self._path(number) + ".status", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return exit_code(os.read(fd, 8).decode("latin-1"))
        except OSError:
            return None
        finally:
            os.close(fd)

    def has_started(self, number: int) -> bool:
        """Whether the script of command `number` ran its first line, whatever became of its mark."""
        return os.path.lexists(self._path(number) + ".claim")

    def typing(self, path: str, attempt: int) -> bytes:
        """The keys that run a script at the prompt: clear the line, then source the file.

        The space in front keeps it out of the history. Where line editing is off, only ^U clears the line.
        """
        clear = b"\x01\x0b" if self.is_bash and attempt % 2 == 0 else b"\x15"
        return clear + self.typed_line(path) + b"\r"

    @staticmethod
    def typed_line(path: str) -> bytes:
        """What the terminal echoes of `typing` before the line's end."""
        plain = all(character.isalnum() or character in "/._-" for character in path)
        return b" . " + os.fsencode(path if plain else quoted(path))


# The nonce also keeps the prompt recognisable when somebody has changed it. /dev/tty, since a user may redirect the
# shell's own descriptors. vi mode has no line-clearing keys of its own. Bash before 5.1 knows only one PROMPT_COMMAND;
# from then on ours sits where `PROMPT_COMMAND=...` does not overwrite it.
_BASH_RC = r"""
PS1='\[\e[32m\]\w\[\e[0m\] $ '
[ -f ~/.bashrc ] && . ~/.bashrc
HISTCONTROL=ignoreboth
unset HISTFILE
__pigeon_prompt() {
  local __s=$?
  builtin printf '\e]133;NONCE;D;%s;%s\a' "$__s" "$$" >/dev/tty
  [[ $PS1 == *';NONCE;B;'* ]] || PS1=$PS1'\[\e]133;NONCE;B;$?\a\]'
  [[ $PS0 == *';NONCE;C'* ]] || PS0='\e]133;NONCE;C\a'$PS0
  return "$__s"
}
__pigeon_arm() {
  local __s=$?
  local __h='{ __pigeon_prompt; } 2>/dev/null'
  if (( BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501 )); then
    PROMPT_COMMAND[9]=$__h
  elif [[ ${PROMPT_COMMAND-} != "$__h"* ]]; then
    PROMPT_COMMAND=$__h${PROMPT_COMMAND:+; $PROMPT_COMMAND}
  fi
  return "$__s"
}
__pigeon_claim() {
  __pigeon_s=$?
  local __c=$- __r
  set -C
  { builtin true; } >"$1.claim"
  __r=$?
  [[ $__c == *C* ]] || set +C
  return "$__r"
}
__pigeon_run() {
  local __s=$__pigeon_s __t=
  unset -v __pigeon_s
  IFS= builtin read -r -d '' __t <"$2.text" || :
  [[ -z $__t ]] || builtin history -s -- "$__t"
  builtin printf '\e]133;NONCE;X;%s\a' "$1" >/dev/tty
  return "$__s"
}
__pigeon_over() {
  local __s=$?
  builtin printf %s "$__s" >|"$1.status"
  __pigeon_arm
  return "$__s"
}
__pigeon_arm
bind -m vi-insert '"\C-a\C-k": kill-whole-line' 2>/dev/null
bind -m vi-command '"\C-a\C-k": "S"' 2>/dev/null
"""
_SH_RC = r"""
unset ENV
__pigeon_claim() {
  __pigeon_s=$1
  case $- in
  *C*) { true; } >"$2.claim" ;;
  *) set -C; { true; } >"$2.claim"; set -- $?; set +C; return "$1" ;;
  esac
}
__pigeon_run() {
  printf '\033]133;NONCE;X;%s\007' "$1" >/dev/tty
  return "$__pigeon_s"
}
__pigeon_over() {
  printf %s "$1" >|"$2.status"
  return "$1"
}
PS1='@133;NONCE;D;$?;$$#$PWD $ @133;NONCE;B;$?#'
""".replace("@", "\x1b]").replace("#", "\x07")
_BASH_SCRIPT = """{{ __pigeon_claim {path} || return 0; __pigeon_run {number} {path}; }} 2>/dev/null; eval -- {text}
{{ __pigeon_over {path}; }} 2>/dev/null
"""
_SH_SCRIPT = """{{ __pigeon_claim $? {path} || return 0; __pigeon_run {number}; }} 2>/dev/null; eval {text}
__pigeon_over $? {path}
"""


def exit_code(text: str) -> Optional[int]:
    """The exit code that a shell printed, or None for anything else: user code can write where the shell does."""
    return int(text) if text.isdecimal() and len(text) < 4 and int(text) < 256 else None


def quoted(text: str) -> str:
    """One word of shell input."""
    return "'" + text.replace("'", "'\\''") + "'"


def write_private(path: str, data: bytes) -> None:
    """Write a new file that only this user can read. Raises OSError, FileExistsError too."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    finally:
        os.close(fd)


class Terminal:
    """The PTY and the shell on it: reading, bounded writing, size, signals. Never blocks.

    `on_writable(bool)` is told when input waits for the terminal and when it does no longer.
    """

    BATCH = 64 * KIB

    def __init__(self) -> None:
        self.fd = -1
        self.pid = 0
        self.holding = True  # a shell that is starting could take a ^C for its own; input waits for the prompt
        self._queue = bytearray()
        self._buffer = bytearray(self.BATCH)
        self._view = memoryview(self._buffer)

    def start(
        self, argv: Sequence[str], env: Dict[str, str], cwd: str, size: bytes, limits: Dict[int, int], nice: int
    ) -> None:
        """Start the shell, `nice` steps behind the agent. `size` is a struct winsize; `limits` maps RLIMIT_* numbers
        to values."""
        pid, fd = os.forkpty()
        if pid == 0:
            self._become_shell(argv, env, cwd, size, limits, nice)
        self.pid, self.fd = pid, fd
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)

    @staticmethod
    def _become_shell(
        argv: Sequence[str], env: Dict[str, str], cwd: str, size: bytes, limits: Dict[int, int], nice: int
    ) -> None:
        try:
            fcntl.ioctl(0, termios.TIOCSWINSZ, size)
            attributes = termios.tcgetattr(0)
            attributes[0] |= IUTF8
            termios.tcsetattr(0, termios.TCSANOW, attributes)
            prctl(PR_SET_DUMPABLE, 1)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            _prefer_for_oom_kill()
            _reset_signals()
            for which, value in limits.items():
                resource.setrlimit(which, (value, value))
            os.nice(nice)
            os.chdir(cwd)
            os.execve(argv[0], list(argv), env)  # noqa: S606 - that is the purpose
        except BaseException as error:
            os.write(2, "cannot start {}: {}\n".format(argv[0], error).encode())
        finally:
            os._exit(127)

    def read(self, limit: int) -> Tuple[bytes, bool]:
        """Up to `limit` bytes of output that is there now, and whether the terminal's other side is closed."""
        filled, limit = 0, min(limit, self.BATCH)
        closed = False
        try:
            while filled < limit and not closed:
                count = os.readv(self.fd, [self._view[filled:limit]])
                filled += count
                closed = not count
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            closed = True
        return bytes(self._view[:filled]), closed

    @property
    def queued(self) -> int:
        """Input bytes that the terminal has not taken yet."""
        return len(self._queue)

    @property
    def writable(self) -> bool:
        """Whether there is something to write as soon as the terminal takes it."""
        return bool(self._queue) and not self.holding

    def write(self, data: bytes) -> None:
        """Type `data`. Raises Refused `input_full` when too much waits already; an interrupt character goes through
        all the same and, as in any terminal, takes the input before it along."""
        if self.writable:
            interrupt = self._interrupt_in(data)
            if interrupt >= 0:
                self._queue.clear()
                termios.tcflush(self.fd, termios.TCOFLUSH)
                data = data[interrupt:]
        if len(self._queue) + len(data) > MAX_INPUT_QUEUE_BYTES:
            raise Refused("input_full", "{} bytes wait for the terminal".format(len(self._queue)))
        self._queue += data
        self.flush()

    def _interrupt_in(self, data: bytes) -> int:
        """Where in `data` the last character is that the terminal turns into SIGINT, or -1."""
        try:
            attributes = termios.tcgetattr(self.fd)
        except termios.error:
            return -1
        character = attributes[6][termios.VINTR]
        if not attributes[3] & termios.ISIG or not isinstance(character, bytes) or character == b"\0":
            return -1
        return data.rfind(character)

    def flush(self) -> None:
        """Write what waits, as far as the terminal takes it."""
        if self.holding:
            return
        try:
            while self._queue:
                del self._queue[: os.write(self.fd, self._queue[: 4 * KIB])]
        except BlockingIOError:
            pass
        except OSError:
            self._queue.clear()

    def release(self) -> None:
        """The shell is there: input goes to it from now on."""
        self.holding = False
        self.flush()

    def drop_input(self) -> None:
        """Forget the input that waits."""
        self._queue.clear()

    def type_end_of_file(self) -> None:
        """Type the terminal's end-of-file character."""
        try:
            character = termios.tcgetattr(self.fd)[6][termios.VEOF]
        except termios.error:
            character = b"\x04"
        self.write(character if isinstance(character, bytes) else b"\x04")

    def resize(self, size: bytes) -> None:
        """Set the size (a struct winsize); the foreground is told by SIGWINCH."""
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, size)

    def foreground(self) -> int:
        """The process group that holds the terminal, 0 if none does."""
        try:
            return struct.unpack("i", fcntl.ioctl(self.fd, termios.TIOCGPGRP, b"\0" * 4))[0]  # type: ignore[no-any-return]
        except OSError:
            return 0

    @property
    def shell_has_it(self) -> bool:
        """Whether the shell itself holds the foreground: no program of its own does."""
        return self.foreground() == self.pid

    def signal_foreground(self, number: int) -> None:
        """Signal whoever holds the terminal, reading or not."""
        group = self.foreground()
        if group > 1:
            _kill_group(group, number)

    def signal_shell(self, number: int) -> None:
        """Signal the shell's own process group."""
        _kill_group(self.pid, number)

    def cwd(self) -> Optional[str]:
        """The shell's current directory, or None if it cannot be told."""
        try:
            return os.fsencode(os.readlink("/proc/{}/cwd".format(self.pid))).decode("utf-8", "replace")
        except OSError:
            return None


def winsize(rows: int, cols: int) -> bytes:
    """A struct winsize."""
    return struct.pack("HHHH", rows, cols, 0, 0)


def _kill_group(group: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(group, number)


def _reset_signals() -> None:
    """Whoever started the agent may have ignored or blocked signals, which a child would inherit."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)


def _prefer_for_oom_kill() -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")


# Files -------------------------------------------------------------------------------------------

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OS_ERRORS = {
    errno.ENOENT: "not_found",
    errno.ENOTDIR: "bad_path",
    errno.ELOOP: "bad_path",
    errno.EISDIR: "not_a_file",
    errno.ENAMETOOLONG: "bad_path",
    errno.ENOSPC: "no_space",
    errno.EDQUOT: "no_space",
    errno.EFBIG: "no_space",
}


def split_path(path: object, root_too: bool = False) -> List[str]:
    """The components of a path below the workspace. Raises Refused `bad_path` for anything that is none."""
    if not isinstance(path, str) or "\0" in path or path.startswith("/"):
        raise Refused("bad_path", "not a path below the workspace", path=path)
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise Refused("bad_path", "not UTF-8", path="") from None
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if size > MAX_PATH_BYTES or len(parts) > MAX_PATH_DEPTH or ".." in parts or not (parts or root_too):
        raise Refused("bad_path", "not a path below the workspace", path=path)
    return parts


class Descent:
    """A walk below one directory, a component at a time, holding a descriptor of every directory on the way.

    Symbolic links are followed only as far as they stay inside: the walk reads them itself and never lets the kernel
    follow one, so that a link swapped in meanwhile cannot lead out.
    """

    MAX_LINKS = 32

    def __init__(self, root: str) -> None:
        self._root = root
        self._stack = [os.open(root, _DIRECTORY)]

    def __enter__(self) -> Descent:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._stack:
            os.close(fd)

    @property
    def fd(self) -> int:
        """The directory where the walk is."""
        return self._stack[-1]

    def to(self, parts: Sequence[str], create: bool = False, follow_last: bool = False) -> str:
        """Go to the directory of the last component and return its name there ("." if it is the directory itself).

        Missing directories are made if `create`. Raises Refused or OSError.
        """
        pending = collections.deque(parts)
        links = 0
        while pending:
            part = pending.popleft()
            if part == "..":
                self._ascend()
                continue
            target = self._link(part) if pending or follow_last else None
            if target is not None:
                links += 1
                if links > self.MAX_LINKS:
                    raise Refused("bad_path", "too many symbolic links")
                pending.extendleft(reversed(self._inside(target)))
            elif pending:
                self._descend(part, create)
            else:
                return part
        return "."

    def _link(self, part: str) -> Optional[str]:
        try:
            return os.readlink(part, dir_fd=self.fd)
        except OSError:
            return None

    def _inside(self, target: str) -> List[str]:
        if target.startswith("/"):
            if target != self._root and not target.startswith(self._root.rstrip("/") + "/"):
                raise Refused("bad_path", "a symbolic link leads out of the workspace")
            target = target[len(self._root) :]
            while len(self._stack) > 1:
                self._ascend()
        return [part for part in target.split("/") if part not in ("", ".")]

    def _ascend(self) -> None:
        if len(self._stack) == 1:
            raise Refused("bad_path", "a symbolic link leads out of the workspace")
        os.close(self._stack.pop())

    def _descend(self, part: str, create: bool) -> None:
        if len(self._stack) > MAX_PATH_DEPTH:
            raise Refused("bad_path", "too deep")
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=self.fd)
        self._stack.append(os.open(part, _DIRECTORY, dir_fd=self.fd))


class Files:
    """What workers and their users do with files of the workspace. Long work comes as jobs: generators that yield
    every so often and return the reply. Raises Refused only; paths are relative to the workspace."""

    def __init__(self, root: str, run_dir: str) -> None:
        self.root = os.path.realpath(root)
        self._skip = _identity(run_dir)

    def write(self, items: Sequence[Json]) -> Job:
        """Carry out a list of writes, directories and deletions in order; the first refusal stops."""
        written = 0
        for item in items:
            path = item.get("path") if isinstance(item, dict) else None
            try:
                yield from self._write_item(item, split_path(path))
            except Refused as refused:
                raise Refused(refused.code, str(refused), path=path, written=written) from refused
            except OSError as error:
                raise _refusal(error, path=path, written=written) from error
            written += 1
            yield
        return {"written": written}

    def _write_item(self, item: Json, parts: List[str]) -> Job:
        kind = item.get("type", "file")
        with Descent(self.root) as descent:
            if kind == "file":
                self._write_file(descent, parts, _content(item), _mode(item))
            elif kind == "directory":
                descent.to([*parts, "."], create=True)
            elif kind == "delete":
                yield from self._delete(descent, parts)
            else:
                raise Refused("malformed", "unknown type of file")

    @staticmethod
    def _write_file(descent: Descent, parts: List[str], data: bytes, mode: int) -> None:
        name = descent.to(parts, create=True)
        temporary = ".pigeon-" + os.urandom(8).hex()
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=descent.fd)
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(fd, mode)
            os.rename(temporary, name, src_dir_fd=descent.fd, dst_dir_fd=descent.fd)
        except OSError:
            os.unlink(temporary, dir_fd=descent.fd)
            raise

    def _delete(self, descent: Descent, parts: List[str]) -> Job:
        try:
            name = descent.to(parts)
        except FileNotFoundError:
            return
        deep = collections.deque([(descent.fd, name)])
        while deep:
            fd, name = deep.popleft()
            yield from self._delete_tree(descent, fd, name, deep, 0)

    def _delete_tree(self, descent: Descent, parent: int, name: str, deep: Deque[Tuple[int, str]], depth: int) -> Job:
        try:
            os.unlink(name, dir_fd=parent)
            return
        except FileNotFoundError:
            return
        except (IsADirectoryError, PermissionError):
            pass
        if depth == MAX_PATH_DEPTH:  # taken up from nearer the top, so that no depth runs out of descriptors
            moved = ".pigeon-" + os.urandom(8).hex()
            os.rename(name, moved, src_dir_fd=parent, dst_dir_fd=descent.fd)
            deep.append((descent.fd, moved))
            return
        fd = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            for child in os.listdir(fd):
                yield from self._delete_tree(descent, fd, child, deep, depth + 1)
                yield
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=parent)

    def read(self, path: object, limit: int) -> Json:
        """A regular file's content, in base64. Never waits for a FIFO or a device."""
        parts = split_path(path)
        try:
            with Descent(self.root) as descent:
                name = descent.to(parts, follow_last=True)
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
                fd = os.open(name, flags, dir_fd=descent.fd)
            with open(fd, "rb") as file:
                return _read_regular(file.fileno(), limit)
        except OSError as error:
            raise _refusal(error, path=path) from error

    def list(self, path: object, limit: int) -> Job:
        """The files below a directory, depth first, sorted by name."""
        files: List[Json] = []
        size, truncated = 0, False
        walk = self.entries(split_path(path, root_too=True))
        try:
            for name, info in walk:
                described = _described(name, info)
                size += len(encode_json(described))
                if len(files) >= limit or size > MAX_LISTED_BYTES:
                    truncated = True
                    break
                files.append(described)
                yield
        except OSError as error:
            raise _refusal(error, path=path) from error
        finally:
            walk.close()
        return {"files": files, "truncated": truncated}

    def entries(self, parts: List[str]) -> Generator[Entry, None, None]:
        """(path below the workspace, lstat) of everything below a directory. Raises Refused or OSError at the start."""
        with Descent(self.root) as descent:
            descent.to([*parts, "."])
            yield from self._entries(descent.fd, "/".join(parts), MAX_PATH_DEPTH - len(parts))

    def _entries(self, fd: int, prefix: str, depth: int) -> Generator[Entry, None, None]:
        with os.scandir(fd) as directory:
            names = sorted(entry.name for entry in itertools.islice(directory, MAX_SCANNED_FILES + 1))
        for name in names:
            path = prefix + "/" + name if prefix else name
            try:
                info = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if (info.st_dev, info.st_ino) == self._skip:
                    continue
                yield path, info
                if not stat.S_ISDIR(info.st_mode) or not depth:
                    continue
                child = os.open(name, _DIRECTORY, dir_fd=fd)
            except OSError:  # gone meanwhile, or not ours to read
                continue
            try:
                yield from self._entries(child, path, depth - 1)
            finally:
                os.close(child)

    def snapshot(self) -> Job:
        """What is in the workspace now, to be compared by `changes`; None if it is too much to look at."""
        seen: Dict[str, Signature] = {}
        size = 0
        walk = self.entries([])
        try:
            for path, info in walk:
                size += len(path)
                if len(seen) >= MAX_SCANNED_FILES or size > MAX_SCANNED_BYTES:
                    return None
                is_directory = stat.S_ISDIR(info.st_mode)
                seen[path] = (-1, 0, info.st_ino) if is_directory else (info.st_mtime_ns, info.st_size, info.st_ino)
                yield
        except (OSError, Refused):
            return None
        finally:
            walk.close()
        return seen


def changes(before: Dict[str, Signature], after: Dict[str, Signature]) -> Tuple[List[Json], bool]:
    """What differs between two snapshots, sorted by path, and whether there was more than is named."""
    kinds = dict.fromkeys(before.keys() - after.keys(), "deleted")
    kinds.update((path, "created") for path in after.keys() - before.keys())
    kinds.update((path, "modified") for path, signature in after.items() if before.get(path, signature) != signature)
    named: List[Json] = []
    size = 0
    for path in sorted(kinds)[:MAX_CHANGED_FILES]:
        change = {"path": _printable(path), "change": kinds[path]}
        size += len(encode_json(change))
        if size > MAX_CHANGED_BYTES:
            break
        named.append(change)
    return named, len(kinds) > len(named)


def _identity(path: str) -> Tuple[int, int]:
    info = os.stat(path)
    return info.st_dev, info.st_ino


def _refusal(error: OSError, **details: object) -> Refused:
    code = _OS_ERRORS.get(error.errno or 0, "denied")
    return Refused(code, os.strerror(error.errno or 0), **details)


def _content(item: Json) -> bytes:
    import base64

    try:
        return base64.b64decode(item.get("data", ""), validate=True)
    except (TypeError, ValueError):
        raise Refused("malformed", "data is not base64") from None


def _mode(item: Json) -> int:
    mode = item.get("mode")
    if mode is None:
        return 0o644
    if not isinstance(mode, int) or not 0 <= mode <= 0o777:
        raise Refused("malformed", "mode is not one of 0 to 0777")
    return mode


def _read_regular(fd: int, limit: int) -> Json:
    import base64

    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise Refused("not_a_file", "not a regular file")
    data = b""
    if info.st_size <= limit:
        data = os.read(fd, limit + 1)
    if info.st_size > limit or len(data) > limit:
        raise Refused("too_large", "more than {} bytes".format(limit), size=info.st_size)
    return {"data": base64.b64encode(data).decode(), "size": len(data), "mode": stat.S_IMODE(info.st_mode)}


def _described(path: str, info: os.stat_result) -> Json:
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}
    return {
        "path": _printable(path),
        "type": kinds.get(stat.S_IFMT(info.st_mode), "other"),
        "size": info.st_size,
        "mode": stat.S_IMODE(info.st_mode),
        "modified": info.st_mtime,
    }


def _printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "replace")


# Commands ----------------------------------------------------------------------------------------


class Command:
    """One submitted command and how far it is."""

    def __init__(self, number: int, command_id: str, text: str, timeout: Optional[float]) -> None:
        self.number = number
        self.id = command_id
        self.text = text
        self.timeout = timeout
        self.script = ""
        self.attempts = 0
        self.start_offset: Optional[int] = None
        self.started_at = 0.0
        self.kill_reason = ""
        self.before: Optional[Dict[str, Signature]] = None


class CommandLog:
    """Which commands were ever submitted: numbers are dense from 1, and each number is one command for ever."""

    def __init__(self) -> None:
        self._ids: List[str] = []
        self._numbers: Dict[str, int] = {}

    def is_duplicate(self, number: int, command_id: str) -> bool:
        """Whether this was submitted before. Raises Refused `command_gap` or `command_conflict`."""
        if self._numbers.get(command_id, number) != number:
            raise Refused("command_conflict", "this command has another number", expected=self._numbers[command_id])
        if 1 <= number <= len(self._ids):
            if self._ids[number - 1] != command_id:
                raise Refused("command_conflict", "this number is another command's")
            return True
        if number != len(self._ids) + 1:
            raise Refused("command_gap", "not the next command", expected=len(self._ids) + 1)
        return False

    def add(self, number: int, command_id: str) -> None:
        """Remember a command that is not a duplicate."""
        self._ids.append(command_id)
        self._numbers[command_id] = number

    def __contains__(self, command_id: str) -> bool:
        return command_id in self._numbers


class Runner:
    """Runs submitted commands at the shell's prompt, one at a time, and knows from its marks what became of them.

    The marks: `D;status;pid` when a prompt is due, `B;status` when it is shown, `C` when a typed line starts, and
    `X;number` from the first line of a submitted command. An end counts only while the shell holds the terminal,
    or, when typed-ahead input has already started the next program, once the shell's own `C` confirms it.
    """

    def __init__(
        self, loop: Loop, terminal: Terminal, transcript: Transcript, shell: Shell, files: Files, marks: MarkFilter
    ) -> None:
        self._loop = loop
        self._terminal = terminal
        self._transcript = transcript
        self._shell = shell
        self._files = files
        self._marks = marks
        self._log = CommandLog()
        self.waiting: Deque[Command] = collections.deque()
        self.current: Optional[Command] = None
        self.at_prompt = False
        self._type_ahead = False  # lines may wait in the terminal that the shell has not read yet
        self._settling: Optional[Timer] = None
        self._new_prompt = False  # the shell showed a new prompt after we typed, and our line has not started
        self._unheard: Optional[int] = None  # its exit code, if the line has started since and was not heard of
        self._retyping: Optional[Timer] = None
        self._presuming: Optional[Timer] = None
        self.stopping = False
        self.ended = False
        self._report: Optional[Callable[[], None]] = None  # the current command is over, this tells of it
        self._unconfirmed: Optional[Tuple[int, int]] = None
        self._snapshot: Optional[Dict[str, Signature]] = None
        self._scanning = False
        self._no_scan_before = 0.0
        self._escalation: Optional[Timer] = None
        self.on_urgent: Callable[[], None] = _nothing

    @property
    def busy(self) -> bool:
        """Whether anything but the prompt holds the terminal, or a command waits for it."""
        return not self.ended and (not self.at_prompt or self.current is not None or bool(self.waiting))

    # Requests

    def submit(
        self, number: int, command_id: str, text: str, timeout: Optional[float], cancelled: bool = False
    ) -> bool:
        """Queue a command, or only take its number if it is cancelled; returns whether it is a duplicate. Raises
        Refused."""
        if self._log.is_duplicate(number, command_id):
            return True
        if self.ended or self.stopping:
            raise Refused("ended", "the shell is gone")
        if cancelled:
            self._log.add(number, command_id)
            self._tell_unstarted(Command(number, command_id, text, timeout), "cancelled")
            return False
        if len(self.waiting) >= MAX_WAITING_COMMANDS or self._waiting_bytes() + len(text) > MAX_WAITING_BYTES:
            raise Refused("queue_full", "{} commands wait".format(len(self.waiting)))
        self._log.add(number, command_id)
        self.waiting.append(Command(number, command_id, text, timeout))
        self.advance()
        return False

    def _waiting_bytes(self) -> int:
        return sum(len(command.text) for command in self.waiting)

    def cancel(self, command_id: str) -> None:
        """Drop a waiting command, interrupt a running one; one that is over is left alone. Raises Refused."""
        if command_id not in self._log:
            raise Refused("unknown_command", "no such command was submitted")
        if self.current is not None and self.current.id == command_id:
            self._kill_current("cancelled")
        for command in list(self.waiting):
            if command.id == command_id:
                self.waiting.remove(command)
                self._tell_unstarted(command, "cancelled")

    def typed(self, data: bytes) -> None:
        """Input went to the terminal: the prompt is no longer ours if that may have submitted a line."""
        lines = b"\r" in data or b"\n" in data
        if lines or b"\x03" in data:
            self._type_ahead = True
            self.interrupted(may_be_unheard=not lines)

    def interrupted(self, may_be_unheard: bool = True) -> None:
        """Something else than us may have ended the line at the prompt; the next prompt is waited for. A shell may
        take note of a SIGINT only with the next key: then the prompt is still there."""
        _cancel(self._presuming)
        if may_be_unheard and self.at_prompt:
            self._presuming = self._loop.later(PRESUME_SECONDS, self._presume_prompt)
        self.at_prompt = False
        self.files_touched()

    def _presume_prompt(self) -> None:
        if self.current is None and self._terminal.shell_has_it:
            self.at_prompt, self._type_ahead = True, False
            self.advance()

    def files_touched(self) -> None:
        """Files changed outside of a submitted command: those are not the next command's doing."""
        self._snapshot = None

    # Starting

    def advance(self) -> None:
        """Start the next command if the prompt is there and nothing is in the way."""
        ready = self.at_prompt and self.current is None and not self._terminal.queued and not self._type_ahead
        if not (ready and self.waiting) or self.stopping or self.ended:
            return
        if self._snapshot is None and self._may_scan():
            self._scan(self.advance)
            return
        command = self.current = self.waiting.popleft()
        command.before = self._snapshot
        try:
            command.script = command.script or self._shell.script(command.number, command.text)
        except OSError:
            self._give_up(command)
            return
        self._type(command)

    def _type(self, command: Command) -> None:
        echo = self._shell.typed_line(command.script) + b"\r\n"
        paste_off = b"\x1b[?2004l"
        self._marks.expect((echo, b""), (paste_off + b"\r", paste_off))
        self.at_prompt = False
        self._terminal.write(self._shell.typing(command.script, command.attempts))
        self._new_prompt, self._unheard = False, None
        self._retype_in(START_SECONDS)
        self.on_urgent()

    def _retype_in(self, seconds: float) -> None:
        _cancel(self._retyping)
        self._retyping = self._loop.later(seconds, self._retype)

    def _retype(self) -> None:
        """The line we typed has not started: somebody's ^C took it, or another program. It cannot start twice, since
        its script is claimed once; so it may be typed again."""
        command = self.current
        if command is None or command.start_offset is not None or self.ended:
            return
        started = self._shell.has_started(command.number)
        if self._terminal.queued or not self._terminal.shell_has_it or (started and self._unheard is None):
            self._retype_in(START_SECONDS)
            return
        if started:
            self._finish_unheard(command)
            return
        command.attempts += 1
        if command.kill_reason or command.attempts >= MAX_START_ATTEMPTS:
            self._give_up(command)
        else:
            self._type(command)

    def _give_up(self, command: Command) -> None:
        if not command.script:
            self._shell.forget(command.number)
        elif not self._shell.withhold(command.number):
            self._retype_in(START_SECONDS)  # it started just now
            return
        self.current = None
        self._tell_unstarted(command, command.kill_reason or "not_started")
        self._loop.soon(self.advance)

    # Marks from the shell

    def on_mark(self, fields: List[str]) -> None:
        """Take a mark of ours, at the current end of the transcript."""
        _cancel(self._presuming)
        kind, values = fields[0], fields[1:]
        if kind == "D" and values[1:] == [str(self._terminal.pid)]:
            status = exit_code(values[0])
            if status is not None:
                self._prompt_due(status)
        elif kind == "B" and len(values) == 1:
            self._prompt_shown(exit_code(values[0]))
        elif kind == "C":
            self._line_started()
        elif kind == "X" and self.current is not None and values == [str(self.current.number)]:
            self._command_started(self.current)

    def _command_started(self, command: Command) -> None:
        if command.start_offset is not None:
            return
        echo_removed = self._marks.unseen < 2
        self._marks.expect()
        repaint = b"" if echo_removed else b"\r\x1b[2K$ "
        self._transcript.write(repaint + shown(command.text), urgent=True)
        self._begin(command)

    def _begin(self, command: Command) -> None:
        self._transcript.settle_gap()
        command.start_offset = self._transcript.end
        command.started_at = time.monotonic()
        self._transcript.mark("started", commandId=command.id, number=command.number, offset=command.start_offset)
        self.on_urgent()
        if command.kill_reason:
            self._escalate(0)
        elif command.timeout is not None:
            self._escalation = self._loop.later(command.timeout, lambda: self._kill_current("timeout"))

    def _prompt_due(self, status: int) -> None:
        command = self.current
        self.at_prompt = False
        if command is None or self._report is not None:
            return
        if command.start_offset is None:
            self._new_prompt = True
            self._not_started(command, status)
        elif self._terminal.shell_has_it:
            self._finish(status)
        else:
            self._transcript.settle_gap()
            self._unconfirmed = (status, self._transcript.end)

    def _not_started(self, command: Command, status: int) -> None:
        """A new prompt, and no mark of the command we typed: only the mark was lost, or the line was, or it waits
        behind lines that a user typed. What has started since that prompt is marked right after it."""
        if self._shell.has_started(command.number):
            self._unheard = status
        self._retype_in(START_SECONDS)

    def _finish_unheard(self, command: Command) -> None:
        """The mark of a start was lost, and its command is over."""
        assert self._unheard is not None
        self._marks.expect()
        status = self._unheard
        self._begin(command)
        self._finish(status)
        self._prompt_shown(None)

    def _prompt_shown(self, status: Optional[int]) -> None:
        command = self.current
        if not self._terminal.shell_has_it:
            return
        if command is not None and self._report is None:
            if command.start_offset is None:
                self._prompt_without_us()
                return
            if self._unconfirmed is not None:
                self._confirm()
            elif status is not None:  # somebody took our hook out of PROMPT_COMMAND
                self._finish(status)
        self.at_prompt = True
        if self._terminal.holding:
            self._terminal.release()
        if self._type_ahead:
            self._settle()
        self.advance()

    def _prompt_without_us(self) -> None:
        """A prompt while our line is on its way: drawn again, or a new one, which the line may still follow."""
        over = self.current is not None and self._shell.status(self.current.number) is not None
        if self._new_prompt and (self._unheard is None or over):
            self._retype_in(SETTLE_SECONDS)

    def _settle(self) -> None:
        """Wait until the shell has read what was typed ahead: the prompt that stays is the one to use."""
        _cancel(self._settling)
        self._settling = self._loop.later(SETTLE_SECONDS, self._settled)

    def _settled(self) -> None:
        if self.at_prompt:
            self._type_ahead = False
            self.advance()

    def _line_started(self) -> None:
        self.at_prompt = False
        if self._unconfirmed is not None:
            self._confirm()

    def _confirm(self) -> None:
        assert self._unconfirmed is not None
        status, offset = self._unconfirmed
        self._finish(status, offset)

    # Ending

    def _finish(self, status: int, offset: Optional[int] = None) -> None:
        """The current command ended at `offset` (None: here); tell so once it is known what it changed."""
        command = self.current
        assert command is not None
        self._transcript.settle_gap()
        end = self._transcript.end if offset is None else offset
        cwd, seconds = self._terminal.cwd(), time.monotonic() - command.started_at
        noted = self._shell.status(command.number)
        status = status if noted is None else noted
        if self.stopping and status > 128:  # our own hang-up, which it died of before its shell did
            command.kill_reason = command.kill_reason or "stopped"
        self._unconfirmed = None
        _cancel(self._escalation)
        self._shell.forget(command.number)
        self._report = lambda: self._tell(command, end, status, cwd, seconds)
        if command.before is None or not self._may_scan():
            self._snapshot = None
            self._finished()
        else:
            self._scan(self._finished)

    def _finished(self) -> None:
        """Tell of the command that is over, now that its files have been looked at."""
        report, self._report = self._report, None
        if report is not None:
            self.current = None
            report()
            self.advance()

    def _tell(self, command: Command, offset: int, status: int, cwd: Optional[str], seconds: float) -> None:
        changed: List[Json] = []
        truncated = True
        if command.before is not None and self._snapshot is not None:
            changed, truncated = changes(command.before, self._snapshot)
        self._mark_finished(
            command,
            startOffset=command.start_offset,
            offset=offset,
            exitCode=None if command.kill_reason else status,
            outcome="killed" if command.kill_reason else "exited",
            reason=command.kill_reason or None,
            cwd=cwd,
            seconds=round(seconds, 6),
            changed=changed,
            changedTruncated=truncated,
        )

    def _tell_unstarted(self, command: Command, reason: str) -> None:
        self._mark_finished(
            command,
            startOffset=None,
            exitCode=None,
            outcome="killed",
            reason=reason,
            cwd=None,
            seconds=0.0,
            changed=[],
            changedTruncated=False,
        )

    def _mark_finished(self, command: Command, **fields: object) -> None:
        self._transcript.mark("finished", commandId=command.id, number=command.number, **fields)
        self.on_urgent()

    def shell_gone(self, code: Optional[int], number: Optional[int]) -> None:
        """The shell has ended with an exit code, or by a signal: settle every command, then mark the end."""
        _cancel(self._escalation)
        self.ended, self.at_prompt = True, False
        if self._report is not None:
            self._snapshot = drain(self._files.snapshot())
            self._finished()
        elif self.current is not None:
            self._end_with_shell(self.current, code)
        self.current = None
        reason = "stopped" if self.stopping else "shell_ended"
        for waiting in self.waiting:
            self._tell_unstarted(waiting, reason)
        self.waiting.clear()
        self._transcript.mark("ended", exitCode=code, signal=number)

    def _end_with_shell(self, command: Command, code: Optional[int]) -> None:
        if command.start_offset is None and self._shell.has_started(command.number):
            self._begin(command)
        if self.stopping or code is None:
            command.kill_reason = command.kill_reason or ("stopped" if self.stopping else "shell_ended")
        _cancel(self._escalation)
        if command.start_offset is None:
            self._tell_unstarted(command, command.kill_reason or "shell_ended")
            return
        self._snapshot = drain(self._files.snapshot()) if command.before is not None else None
        self._transcript.settle_gap()
        seconds = time.monotonic() - command.started_at
        self._tell(command, self._transcript.end, code or 0, None, seconds)

    # Killing

    def _kill_current(self, reason: str) -> None:
        command = self.current
        if command is None or self._report is not None or command.kill_reason:
            return
        command.kill_reason = reason
        if command.start_offset is not None:
            _cancel(self._escalation)
            self._escalate(0)

    def _escalate(self, step: int) -> None:
        """INT, TERM, KILL to the foreground; then the shell itself, should a loop in it outlive all that."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
        if step < len(numbers):
            self._terminal.signal_foreground(numbers[step])
            self._escalation = self._loop.later(ESCALATION_SECONDS, lambda: self._escalate(step + 1))
        else:
            self._terminal.signal_shell(signal.SIGKILL)

    # Looking at files

    def _may_scan(self) -> bool:
        return time.monotonic() >= self._no_scan_before

    def _scan(self, then: Callable[[], None]) -> None:
        if self._scanning:
            return
        self._scanning = True

        def scanned(found: Optional[Dict[str, Signature]]) -> None:
            self._scanning = False
            self._snapshot = found
            if found is None:
                self._no_scan_before = time.monotonic() + SCAN_PAUSE_SECONDS
            then()

        self._loop.job(self._files.snapshot(), scanned)


def shown(text: str) -> bytes:
    """How a command's text looks in the transcript: continuation lines as the shell shows them, nothing that
    would steer a terminal, and only the start of a very long one."""
    data = text.rstrip("\n").encode("utf-8", "replace")
    rest = len(data) - MAX_SHOWN_BYTES
    lines = data[:MAX_SHOWN_BYTES].decode("utf-8", "ignore").split("\n")
    if rest > 0:
        lines.append("... ({} more bytes)".format(rest))
    return "".join(_visible(line) + "\r\n" for line in "\n> ".join(lines).split("\n")).encode()


def _visible(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(_caret(character) for character in line)


def _caret(character: str) -> str:
    code = ord(character)
    if code < 0x20 and character != "\t":
        return "^" + chr(code + 64)
    if 0x7F <= code < 0xA0:
        return "^?"
    return character


def drain(job: Job) -> Any:
    """Run a job to its end at once; returns its result."""
    while True:
        try:
            next(job)
        except StopIteration as stop:
            return stop.value


def _cancel(timer: Optional[Timer]) -> None:
    if timer is not None:
        timer.cancel()


def _nothing() -> None:
    pass


# The loop ----------------------------------------------------------------------------------------


class Timer:
    """Something to be done at a time; it can be called off."""

    __slots__ = ("_callback", "at")

    def __init__(self, at: float, callback: Callable[[], None]) -> None:
        self.at = at
        self._callback: Optional[Callable[[], None]] = callback

    def __lt__(self, other: Timer) -> bool:
        return self.at < other.at

    def cancel(self) -> None:
        """Do nothing at that time."""
        self._callback = None

    def fire(self) -> None:
        """Do it, once."""
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class Loop:
    """Descriptors by epoll, timers, and jobs: long work in slices, so that output never waits for it."""

    LONGEST_WAIT = 86_400.0  # seconds; epoll counts milliseconds in 32 bits

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: Dict[int, Callable[[int], None]] = {}
        self._masks: Dict[int, int] = {}
        self._timers: List[Timer] = []
        self._jobs: Deque[Tuple[Job, Callable[[Any], None]]] = collections.deque()

    def watch(self, fd: int, mask: int, handler: Callable[[int], None]) -> None:
        """Call `handler(events)` whenever `fd` is ready in the sense of `mask`; a mask of 0 forgets it."""
        if not mask:
            self.forget(fd)
        elif fd not in self._masks:
            self._epoll.register(fd, mask)
        elif self._masks[fd] != mask:
            self._epoll.modify(fd, mask)
        if mask:
            self._masks[fd] = mask
            self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """Watch `fd` no longer."""
        if self._masks.pop(fd, None) is not None:
            self._epoll.unregister(fd)
            del self._handlers[fd]

    def later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call back after that many seconds."""
        timer = Timer(time.monotonic() + seconds, callback)
        heapq.heappush(self._timers, timer)
        return timer

    def soon(self, callback: Callable[[], None]) -> None:
        """Call back in the next round."""
        self.later(0, callback)

    def job(self, job: Job, done: Callable[[Any], None]) -> None:
        """Run a generator in slices and hand its result over; what it raises, `done` has to expect as a value."""
        self._jobs.append((job, done))

    def once(self) -> None:
        """Wait for something to do, and do it."""
        for fd, events in self._epoll.poll(self._patience()):
            handler = self._handlers.get(fd)
            if handler is not None:
                handler(events)
        now = time.monotonic()
        while self._timers and self._timers[0].at <= now:
            heapq.heappop(self._timers).fire()
        if self._jobs:
            self._slice()

    def _patience(self) -> float:
        if self._jobs:
            return 0
        if not self._timers:
            return self.LONGEST_WAIT
        return min(max(0.0, self._timers[0].at - time.monotonic()), self.LONGEST_WAIT)

    def _slice(self) -> None:
        job, done = self._jobs.popleft()
        deadline = time.monotonic() + SLICE_SECONDS
        try:
            while time.monotonic() < deadline:
                next(job)
        except StopIteration as stop:
            done(stop.value)
        except Refused as refused:
            done(refused)
        else:
            self._jobs.append((job, done))


# The session -------------------------------------------------------------------------------------


class Session:
    """One opened session: the shell on its terminal, what it printed, its commands and files."""

    DRAIN_SECONDS = 1.0  # how long what the shell left in the terminal is waited for

    def __init__(self, loop: Loop, settings: Settings, fields: Json) -> None:
        """`fields` are those of OPEN. Raises Refused `malformed`."""
        self._loop = loop
        self._settings = settings
        self._spool_limit = number(fields, "spoolBytes", low=1, default=DEFAULT_SPOOL_BYTES)
        self._size = winsize(number(fields, "rows", 1, 0xFFFF), number(fields, "cols", 1, 0xFFFF))
        self._env = environment(fields.get("env"))
        self._notice = text(fields, "notice", "")
        self._shell = Shell.find("".join(str(byte % 10) for byte in os.urandom(20)), settings.run_dir)
        self._marks = MarkFilter(self._shell.nonce)
        self._hold: Optional[Timer] = None
        self._gap_timer: Optional[Timer] = None
        self._urgent_until = 0.0
        self._input_at = time.monotonic()
        self._output_at = time.monotonic()
        self._closed = False  # nobody has the terminal's other side open
        self._exit: Optional[int] = None
        self._drain_until = 0.0
        self.over = False
        self.transcript = Transcript(number(fields, "outputBytes", default=DEFAULT_OUTPUT_BYTES))
        self.terminal = Terminal()
        self.files = Files(settings.workspace, settings.run_dir)
        self.runner = Runner(loop, self.terminal, self.transcript, self._shell, self.files, self._marks)
        self.runner.on_urgent = self._expect_output

    def start(self) -> None:
        """Show the notice and start the shell."""
        if self._notice:
            self.transcript.write(
                "".join(line + "\r\n" for line in self._notice.splitlines()).encode("utf-8", "replace")
            )
        self._shell.prepare()
        env = self._shell.environment(self._settings.workspace, self._env)
        settings = self._settings
        self.terminal.start(self._shell.argv(), env, settings.workspace, self._size, settings.limits, settings.nice)
        self._loop.later(START_SECONDS, self._release_input)
        self._watch()

    def status(self) -> Json:
        """The fields of STATUS."""
        now, transcript = time.monotonic(), self.transcript
        command = self.runner.current
        return {
            "state": self._state(),
            "busy": self.runner.busy,
            "commandId": command.id if command else None,
            "waiting": len(self.runner.waiting),
            "lastInputSeconds": round(now - self._input_at, 3),
            "lastOutputSeconds": round(now - self._output_at, 3),
            "committed": transcript.spool.start,
            "end": transcript.end,
            "marks": transcript.last_mark,
            "discarded": transcript.discarded,
        }

    def _state(self) -> str:
        if self.over:
            return "ended"
        if self.runner.stopping:
            return "stopping"
        return "busy" if self.runner.busy else "idle"

    # Input

    def type(self, data: bytes) -> None:
        """Give input to whoever holds the terminal. Raises Refused `input_full` or `ended`."""
        self.alive()
        self.terminal.write(data)
        self.runner.typed(data)
        self._input_at = time.monotonic()
        self._expect_output()
        self._watch()

    def type_end_of_file(self) -> None:
        """Type the end-of-file character."""
        self.alive()
        self.terminal.type_end_of_file()
        self._input_at = time.monotonic()
        self._expect_output()

    def signal(self, name: str) -> None:
        """Signal the foreground. The shell itself at its prompt gets only INT: there is nothing to end."""
        self.alive()
        self._input_at = time.monotonic()
        if self.terminal.holding:
            return
        if self.runner.at_prompt and self.terminal.shell_has_it:
            if name != "INT":
                return
            self.runner.interrupted()
        self.terminal.signal_foreground(SIGNALS[name])
        self._expect_output()

    def alive(self) -> None:
        """Raises Refused `ended` when the shell is gone."""
        if self._exit is not None:
            raise Refused("ended", "the shell is gone")

    def _release_input(self) -> None:
        if self.terminal.holding and self._exit is None:
            self.terminal.release()
            self._watch()

    def _expect_output(self) -> None:
        self._urgent_until = time.monotonic() + ECHO_SECONDS
        self._watch()

    # Output

    def ack(self, offset: int) -> None:
        """Everything before `offset` is committed."""
        self.transcript.spool.ack(offset)
        self._watch()

    def _room(self) -> int:
        return self._spool_limit - self.transcript.spool.held

    def _watch(self) -> None:
        """Read while there is room, write while something waits."""
        if self._exit is not None or self._closed or self.terminal.fd < 0:
            return
        mask = (select.EPOLLIN if self._room() > 0 else 0) | (select.EPOLLOUT if self.terminal.writable else 0)
        self._loop.watch(self.terminal.fd, mask, self._on_terminal)

    def _on_terminal(self, events: int) -> None:
        if events & (select.EPOLLOUT | select.EPOLLHUP):
            self.terminal.flush()
            self.runner.advance()
        if events & (select.EPOLLIN | select.EPOLLHUP) and self._room() > 0:
            data, self._closed = self.terminal.read(self._room())
            self._take(data)
            if self._closed:
                self._loop.forget(self.terminal.fd)
                self._loop.later(0.1, self._reopen)
        self._watch()

    def _reopen(self) -> None:
        """The shell may live on without any descriptor of its terminal, and open it again."""
        self._closed = False
        self._watch()

    def _take(self, data: bytes) -> None:
        _cancel(self._hold)
        if data:
            self._output_at = time.monotonic()
        urgent = self._output_at < self._urgent_until
        for piece in self._marks.feed(data):
            if isinstance(piece, ShellMark):
                self.runner.on_mark(piece.fields)
            else:
                self.transcript.write(piece, urgent)
        if self._marks.held:
            wait = ECHO_HOLD_SECONDS if self._marks.unseen else HOLD_SECONDS
            self._hold = self._loop.later(wait, self._release)
        if self.transcript.unsettled and self._gap_timer is None:
            self._gap_timer = self._loop.later(GAP_SECONDS, self._settle)

    def _release(self) -> None:
        self.transcript.write(self._marks.release(), time.monotonic() < self._urgent_until)

    def _settle(self) -> None:
        self._gap_timer = None
        self.transcript.settle_gap()

    # The end

    def stop(self) -> None:
        """Hang the terminal up; what does not heed that is killed 2 s later."""
        if self._exit is not None or self.runner.stopping:
            return
        self.runner.stopping = True
        self.terminal.drop_input()
        for number in (signal.SIGHUP, signal.SIGCONT):
            self.terminal.signal_foreground(number)
            self.terminal.signal_shell(number)
        self._loop.later(ESCALATION_SECONDS, self._kill)

    def _kill(self) -> None:
        if self._exit is None:
            self.terminal.signal_shell(signal.SIGKILL)

    def shell_exited(self, status: int) -> None:
        """The shell was reaped with this wait status: end what it left behind and take what is still in the PTY."""
        self._exit = status
        self.runner.ended = True
        self._loop.forget(self.terminal.fd)
        self._drain_until = time.monotonic() + self.DRAIN_SECONDS
        self._drain()

    def _drain(self) -> None:
        kill_descendants(1)
        data, closed = self.terminal.read(Terminal.BATCH)
        self._take(data)
        if closed or time.monotonic() > self._drain_until:
            self._conclude()
        else:
            self._loop.later(0 if data else 0.01, self._drain)

    def _conclude(self) -> None:
        if self._marks.held:
            self._release()
        assert self._exit is not None
        if os.WIFSIGNALED(self._exit):
            self.runner.shell_gone(None, os.WTERMSIG(self._exit))
        else:
            self.runner.shell_gone(os.WEXITSTATUS(self._exit), None)
        os.close(self.terminal.fd)
        self.over = True


def environment(value: object) -> Dict[str, str]:
    """The variables that OPEN gives. Raises Refused `malformed`."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refused("malformed", "env is not an object")
    for name, content in value.items():
        if not isinstance(content, str) or "\0" in name + content or "=" in name or not name:
            raise Refused("malformed", "env is not names and strings")
    return value


class Requests:
    """What a control connection may ask for. Each operation replies at once with a dictionary, or later by a job."""

    def __init__(self) -> None:
        self._done = RecentIds()
        self._under_way: Set[str] = set()
        self._operations: Dict[str, Callable[[Session, Json], Union[Json, Job]]] = {
            "run": self._run,
            "cancel": self._cancel,
            "input": self._input,
            "resize": self._resize,
            "signal": self._signal,
            "write": self._write,
            "list": self._list,
            "read": self._read,
            "status": self._status,
            "stop": self._stop,
        }

    def carry_out(self, session: Session, fields: Json) -> Union[Json, Job]:
        """Do what a request asks. Raises Refused, and nothing else: a defect in one request must not end a session."""
        operation = self._operations.get(text(fields, "op"))
        if operation is None:
            raise Refused("unknown_op", "no such operation")
        try:
            result = operation(session, fields)
        except Refused:
            raise
        except Exception as error:
            raise Refused("internal", repr(error)) from error
        return result if isinstance(result, dict) else self._guarded(result)

    @staticmethod
    def _guarded(job: Job) -> Job:
        try:
            return (yield from job)
        except Refused:
            raise
        except Exception as error:
            raise Refused("internal", repr(error)) from error

    def _once(self, fields: Json, action: Callable[[], None]) -> Json:
        identity = text(fields, "id")
        if identity in self._done:
            return {"duplicate": True}
        action()
        self._done.add(identity)
        return {"duplicate": False}

    def _run(self, session: Session, fields: Json) -> Json:
        command = text(fields, "text")
        if "\0" in command:
            raise Refused("malformed", "a command cannot have a NUL")
        timeout = fields.get("timeoutSeconds")
        if timeout is not None and (not isinstance(timeout, (int, float)) or not 0 < timeout < 1e9):
            raise Refused("malformed", "timeoutSeconds is not a positive number")
        cancelled = fields.get("cancelled", False)
        if not isinstance(cancelled, bool):
            raise Refused("malformed", "cancelled is not true or false")
        identity = (number(fields, "number", 1), text(fields, "commandId"))
        submitted = session.runner.submit(*identity, command, timeout, cancelled)
        return {"duplicate": submitted}

    @staticmethod
    def _cancel(session: Session, fields: Json) -> Json:
        session.runner.cancel(text(fields, "commandId"))
        return {}

    def _input(self, session: Session, fields: Json) -> Json:
        data = _content(fields)
        return self._once(fields, lambda: session.type(data))

    def _resize(self, session: Session, fields: Json) -> Json:
        size = winsize(number(fields, "rows", 1, 0xFFFF), number(fields, "cols", 1, 0xFFFF))

        def resize() -> None:
            session.alive()
            session.terminal.resize(size)

        return self._once(fields, resize)

    def _signal(self, session: Session, fields: Json) -> Json:
        name = text(fields, "name")
        if name == "EOF":
            return self._once(fields, session.type_end_of_file)
        if name not in SIGNALS:
            raise Refused("malformed", "no such signal")
        return self._once(fields, lambda: session.signal(name))

    def _write(self, session: Session, fields: Json) -> Union[Json, Job]:
        identity, items = text(fields, "id"), fields.get("files")
        if not isinstance(items, list):
            raise Refused("malformed", "files is not a list")
        if identity in self._done:
            return {"duplicate": True, "written": len(items)}
        if identity in self._under_way:
            raise Refused("in_progress", "this write is being carried out")
        self._under_way.add(identity)
        return self._write_job(session, identity, items)

    def _write_job(self, session: Session, identity: str, items: List[Json]) -> Job:
        try:
            reply = yield from session.files.write(items)
            self._done.add(identity)
            return dict(reply, duplicate=False)
        finally:
            self._under_way.discard(identity)
            session.runner.files_touched()

    @staticmethod
    def _list(session: Session, fields: Json) -> Job:
        limit = number(fields, "limit", 1, MAX_LISTED_FILES, default=MAX_LISTED_FILES)
        return session.files.list(text(fields, "path", ""), limit)

    @staticmethod
    def _read(session: Session, fields: Json) -> Json:
        limit = number(fields, "limit", 0, MAX_READ_BYTES, default=MAX_READ_BYTES)
        return session.files.read(text(fields, "path"), limit)

    @staticmethod
    def _status(session: Session, fields: Json) -> Json:
        return session.status()

    @staticmethod
    def _stop(session: Session, fields: Json) -> Json:
        session.stop()
        return {}


# Connections -------------------------------------------------------------------------------------


class Connection:
    """One client: what it sent, what waits to be sent, and, for an attachment, how far along the stream it is."""

    def __init__(self, sock: socket.socket, outside: bool) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.outside = outside
        self.challenge = os.urandom(16).hex()
        self.decoder = FrameDecoder(MAX_STRANGER_BYTES)
        self.role = ""  # "attach" or "control", once proved
        self.admitted_at = self.heard_at = time.monotonic()
        self.refusals = 0
        self.working = False  # a request of this connection is being carried out
        self.closing = False
        self.position = 0
        self.mark = 0
        self.committed = 0  # what it has acked
        self._outgoing: Deque[Union[bytes, memoryview]] = collections.deque()
        self.pending = 0  # bytes that wait to be sent

    def queue(self, *parts: Union[bytes, memoryview]) -> None:
        """Add to what is to be sent."""
        self._outgoing.extend(parts)
        self.pending += sum(map(len, parts))

    def send(self) -> bool:
        """Send what the socket takes; returns whether all is out. Raises OSError when the client is gone."""
        while self._outgoing:
            try:
                sent = self.sock.sendmsg(list(itertools.islice(self._outgoing, 16)))
            except BlockingIOError:
                return False
            self._sent(sent)
        return True

    def _sent(self, count: int) -> None:
        self.pending -= count
        while count:
            first = self._outgoing[0]
            if count < len(first):
                self._outgoing[0] = memoryview(first)[count:]
                return
            count -= len(first)
            self._outgoing.popleft()

    @property
    def readable(self) -> bool:
        """Whether more may be read from it: not while it is being served or lets its answers lie."""
        return not self.working and not self.closing and self.pending < MAX_PENDING_BYTES


class RecentIds:
    """The last ids seen, so that what is delivered twice is done once."""

    def __init__(self) -> None:
        self._ids: collections.OrderedDict[str, None] = collections.OrderedDict()

    def __contains__(self, identity: str) -> bool:
        return identity in self._ids

    def add(self, identity: str) -> None:
        """Remember it, and forget the oldest beyond the limit."""
        self._ids[identity] = None
        if len(self._ids) > MAX_REMEMBERED_IDS:
            self._ids.popitem(last=False)


class Settings:
    """How an agent is started. Times are in seconds."""

    def __init__(
        self,
        workspace: str,
        run_dir: str,
        limits: Optional[Dict[int, int]] = None,
        keepalive: float = 20.0,
        silence: float = 60.0,
        grace: float = 20.0,
        linger: float = 900.0,
        stranger: float = 10.0,
        status: float = 5.0,
        nice: int = 0,
    ) -> None:
        self.workspace = workspace
        self.run_dir = run_dir
        self.limits = limits or {}
        self.keepalive = keepalive  # between PINGs
        self.silence = silence  # after which a client counts as dead
        self.grace = grace  # from SIGTERM to SIGKILL
        self.linger = linger  # how long an ended session's output waits to be acked
        self.stranger = stranger  # how long a client may take to prove the key
        self.status = status  # between STATUS frames
        self.nice = nice  # of the shell and what it runs


class Agent:
    """Listens, lets in who proves the key, and serves the transcript and requests until the shell is gone and
    everything about it is acked."""

    ACCEPTS = 16  # connections in one round, so that a flood of them does not hold the terminal up

    def __init__(self, listener: socket.socket, settings: Settings) -> None:
        self._settings = settings
        self._listener = listener
        self._loop = Loop()
        self._boot_id = os.urandom(16).hex()
        self._key = b""
        self._epoch = -1
        self._connections: Dict[int, Connection] = {}
        self._attached: Optional[Connection] = None
        self._session: Optional[Session] = None
        self._finished = False
        self.terminated = False  # somebody sent SIGTERM
        self._sweep: Optional[Timer] = None
        self._was_busy = False
        self._lingering = False
        self._requests = Requests()

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self._finished

    def run(self) -> None:
        """Serve until done."""
        self._listener.setblocking(False)
        self._loop.watch(self._listener.fileno(), select.EPOLLIN, self._accept)
        self._watch_signals()
        self._keepalive()
        self._tell_status()
        while not self._finished:
            self._loop.once()
            self._after_round()
        kill_descendants(100)

    # Signals

    def _watch_signals(self) -> None:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        self._loop.watch(reader, select.EPOLLIN, lambda _: self._on_signals(os.read(reader, 4 * KIB)))

    def _on_signals(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers:
            self._terminate()
        if signal.SIGCHLD in numbers:
            self._reap()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if self._session is not None and pid == self._session.terminal.pid:
                self._session.shell_exited(status)

    def _terminate(self) -> None:
        self.terminated = True
        if self._session is None:
            self._finished = True
            return
        self._session.stop()
        self._loop.later(max(self._settings.grace - 1.0, self._settings.grace / 2), self._finish)

    def _finish(self) -> None:
        self._finished = True

    # Rounds

    def _after_round(self) -> None:
        session = self._session
        if session is None:
            return
        busy = session.runner.busy
        if busy != self._was_busy:
            self._was_busy = busy
            self._send_status()
        if self._attached is not None:
            self._flush(self._attached)
        if self._attached is not None:
            self._settle(self._attached)
        if session.over and not self._lingering:
            self._lingering = True
            self._loop.later(self._settings.linger, self._finish)
        if session.over and session.transcript.settled:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        for connection in list(self._connections.values()):
            self._end(connection, "ended", "the session has ended")
        self._finished = True

    def _keepalive(self) -> None:
        now = time.monotonic()
        for connection in list(self._connections.values()):
            if not connection.role:
                continue
            if now - connection.heard_at > self._settings.silence and not connection.working:
                self._drop(connection)
            elif connection.pending < MAX_PENDING_BYTES:
                self._send(connection, PING, 0)
        self._loop.later(self._settings.keepalive, self._keepalive)

    def _tell_status(self) -> None:
        self._send_status()
        self._loop.later(self._settings.status, self._tell_status)

    def _send_status(self) -> None:
        if self._session is None or self._attached is None:
            return
        if self._attached.pending < MAX_PENDING_BYTES:
            self._send(self._attached, STATUS, 0, encode_json(self._session.status()))

    # Connections

    def _accept(self, _: int) -> None:
        for _ in range(self.ACCEPTS):
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setblocking(False)
            self._admit(Connection(sock, is_outside(sock)))

    def _admit(self, connection: Connection) -> None:
        """Let a stranger in. Too many of one kind push out the oldest of that kind: what runs in the sandbox cannot
        take the place of a helper that was put in from outside."""
        strangers = [c for c in self._connections.values() if not c.role and c.outside == connection.outside]
        if len(strangers) >= MAX_STRANGERS:
            self._drop(strangers[0])
        self._connections[connection.fd] = connection
        if self._sweep is None:
            self._sweep = self._loop.later(self._settings.stranger / 4, self._expire_strangers)
        hello = {"version": VERSION, "bootId": self._boot_id, "opened": self._session is not None}
        self._send(connection, HELLO, 0, encode_json(dict(hello, challenge=connection.challenge)))

    def _expire_strangers(self) -> None:
        """One timer for all of them: however many come and go, nothing of them is kept."""
        strangers = [connection for connection in self._connections.values() if not connection.role]
        for connection in strangers:
            if time.monotonic() - connection.admitted_at > self._settings.stranger:
                self._end(connection, "too_slow", "nothing was proved in time")
        again = self._loop.later(self._settings.stranger / 4, self._expire_strangers) if strangers else None
        self._sweep = again

    def _drop(self, connection: Connection) -> None:
        if self._connections.get(connection.fd) is not connection:
            return
        del self._connections[connection.fd]
        self._loop.forget(connection.fd)
        connection.sock.close()
        if self._attached is connection:
            self._attached = None

    def _end(self, connection: Connection, code: str, message: str) -> None:
        """Say why, then close: at once if the client takes it, else soon."""
        if connection.closing:
            return
        if self._attached is connection:
            self._attached = None
        self._send(connection, END, 0, encode_json({"code": code, "message": message}), closing=True)
        self._loop.later(1.0, lambda: self._drop(connection))

    def _send(
        self, connection: Connection, kind: int, argument: int, payload: bytes = b"", closing: bool = False
    ) -> None:
        connection.queue(encode_frame(kind, argument, payload))
        connection.closing = connection.closing or closing
        self._flush(connection)

    def _flush(self, connection: Connection) -> None:
        try:
            while True:
                drained = connection.send()
                if not drained or connection is not self._attached or not self._load(connection):
                    break
        except OSError:
            self._drop(connection)
            return
        if drained and connection.closing:
            self._drop(connection)
            return
        self._watch(connection, drained)

    def _watch(self, connection: Connection, drained: bool) -> None:
        if self._connections.get(connection.fd) is not connection:
            return
        mask = (select.EPOLLIN if connection.readable else 0) | (0 if drained else select.EPOLLOUT)
        self._loop.watch(connection.fd, mask, lambda events: self._on_ready(connection, events))

    def _load(self, connection: Connection) -> bool:
        """Queue the next frames of the stream; returns whether there were any."""
        assert self._session is not None
        transcript = self._session.transcript
        while connection.pending < MAX_PENDING_BYTES:
            if not self._load_frame(connection, transcript):
                break
        return connection.pending > 0

    @staticmethod
    def _load_frame(connection: Connection, transcript: Transcript) -> bool:
        until = transcript.end
        index = connection.mark + 1 - transcript.first_mark
        if index < len(transcript.marks):
            mark = transcript.marks[index]
            if mark.offset <= connection.position:
                connection.mark = mark.sequence
                connection.queue(encode_frame(MARK, mark.sequence, mark.payload))
                return True
            until = mark.offset
        if connection.position >= until:
            return False
        run = transcript.spool.read(connection.position, min(MAX_OUT_BYTES, until - connection.position))
        if isinstance(run, Gap):
            length = min(run.length, until - connection.position)
            connection.queue(
                encode_frame(GAP, connection.position, encode_json({"length": length, "reason": run.reason}))
            )
        else:
            length = len(run)
            kind = ECHO if transcript.is_echo(connection.position) else OUT
            connection.queue(HEADER.pack(kind, length, connection.position), run)
        connection.position += length
        return True

    # Frames

    def _on_ready(self, connection: Connection, events: int) -> None:
        if events & select.EPOLLOUT:
            self._take(connection, b"")
        if self._connections.get(connection.fd) is not connection or not connection.readable:
            return
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            self._receive(connection)

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(256 * KIB if connection.role else STRANGER_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(connection)
            return
        connection.heard_at = time.monotonic()
        self._take(connection, data)

    def _take(self, connection: Connection, data: bytes) -> None:
        """Act on the frames that are complete; stop where a request takes longer, and come back here after it."""
        frames = connection.decoder.feed(data)
        try:
            while connection.readable:
                frame = next(frames, None)
                if frame is None:
                    break
                self._on_frame(connection, *frame)
        except ProtocolError as error:
            self._end(connection, "protocol", str(error))
        finally:
            frames.close()
        self._flush(connection)

    def _on_frame(self, connection: Connection, kind: int, argument: int, payload: bytes) -> None:
        if kind == PING and connection.role:
            connection.queue(encode_frame(PONG, argument))
        elif kind == PONG and connection.role:
            pass
        elif kind == OPEN:
            self._answer(connection, argument, self._open, decode_json(payload))
        elif kind == ATTACH:
            self._attach(connection, decode_json(payload))
        elif kind == CONTROL:
            self._answer(connection, 0, lambda fields: self._control(connection, fields), decode_json(payload))
        elif kind in (ACK, ACKMARK) and connection.role == "attach":
            self._acked(connection, kind, argument)
        elif kind == REQUEST and connection.role == "control":
            self._request(connection, argument, decode_json(payload))
        else:
            raise ProtocolError("an unexpected frame of type {}".format(kind))

    def _answer(self, connection: Connection, request: int, action: Callable[[Json], Json], fields: Json) -> None:
        try:
            reply = dict(action(fields), ok=True)
        except Refused as refused:
            reply = refusal(refused)
        except OSError as error:
            reply = refusal(Refused("internal", str(error)))
        connection.queue(encode_frame(REPLY, request, encode_json(reply)))
        connection.refusals += not reply["ok"]
        if connection.refusals >= MAX_REFUSALS and not connection.role:
            self._end(connection, str(reply["code"]), "refused too often")

    def _open(self, fields: Json) -> Json:
        key = _key(fields)
        if self._session is not None:
            if not same(key.hex(), self._key.hex()):
                raise Refused("wrong_key", "another key opened this session")
            return {"bootId": self._boot_id}
        session = Session(self._loop, self._settings, fields)
        session.start()
        self._key, self._session = key, session
        return {"bootId": self._boot_id}

    def _control(self, connection: Connection, fields: Json) -> Json:
        self._check(connection, fields, "control")
        self._trust(connection, "control")
        return {"bootId": self._boot_id}

    def _trust(self, connection: Connection, role: str) -> None:
        connection.role = role
        connection.decoder.limit = MAX_PAYLOAD

    def _check(self, connection: Connection, fields: Json, verb: str) -> None:
        """Raises Refused unless the fields carry the proof of this verb for this connection's challenge."""
        if self._session is None:
            raise Refused("not_open", "no OPEN came yet")
        if connection.role:
            raise Refused("already_proved", "a connection has one role")
        expected = control_proof(self._key, connection.challenge)
        if verb == "attach":
            epoch, offset = number(fields, "epoch"), number(fields, "from")
            expected = attach_proof(self._key, connection.challenge, epoch, offset, _from_mark(fields))
        if not same(expected, text(fields, "proof")):
            raise Refused("wrong_key", "the proof does not match")

    def _attach(self, connection: Connection, fields: Json) -> None:
        try:
            self._check(connection, fields, "attach")
            self._resume(connection, fields)
        except Refused as refused:
            self._end(connection, refused.code, str(refused))
            return
        self._trust(connection, "attach")
        if self._attached is not None:
            self._end(self._attached, "superseded", "a newer attachment took over")
        self._attached = connection
        self._send_status()

    def _resume(self, connection: Connection, fields: Json) -> None:
        assert self._session is not None
        transcript = self._session.transcript
        epoch, offset, mark = fields["epoch"], fields["from"], _from_mark(fields)
        if mark is None:
            mark = transcript.first_mark - 1
        if epoch < self._epoch:
            raise Refused("superseded", "epoch {} has been seen".format(self._epoch))
        if not transcript.spool.start <= offset <= transcript.end:
            raise Refused("bad_offset", "kept: {} to {}".format(transcript.spool.start, transcript.end))
        if not transcript.first_mark - 1 <= mark <= transcript.last_mark:
            raise Refused("bad_mark", "kept: {} to {}".format(transcript.first_mark, transcript.last_mark))
        self._epoch = epoch
        connection.position, connection.mark = offset, mark
        self._session.ack(offset)
        transcript.ack_marks(mark)

    def _acked(self, connection: Connection, kind: int, argument: int) -> None:
        assert self._session is not None
        if connection is not self._attached:
            return
        transcript = self._session.transcript
        if argument > (transcript.end if kind == ACK else connection.mark):
            raise ProtocolError("an ack of what was not sent")
        if kind == ACK:
            connection.committed = max(connection.committed, argument)
            self._settle(connection)
        else:
            transcript.ack_marks(argument)

    def _settle(self, connection: Connection) -> None:
        """Forget what is committed and was sent: another worker may have committed more than this one has seen."""
        assert self._session is not None
        offset = min(connection.committed, connection.position)
        if offset > self._session.transcript.spool.start:
            self._session.ack(offset)

    def _request(self, connection: Connection, request: int, fields: Json) -> None:
        assert self._session is not None
        session = self._session

        def reply(result: Union[Json, Refused]) -> None:
            connection.working = False
            answer = refusal(result) if isinstance(result, Refused) else dict(result, ok=True)
            connection.queue(encode_frame(REPLY, request, encode_json(answer)))

        def reply_late(result: Union[Json, Refused]) -> None:
            if self._connections.get(connection.fd) is connection:
                reply(result)
                self._take(connection, b"")

        try:
            result = self._requests.carry_out(session, fields)
        except Refused as refused:
            reply(refused)
            return
        if isinstance(result, dict):
            reply(result)
        else:
            connection.working = True
            self._loop.job(result, reply_late)


def is_outside(sock: socket.socket) -> bool:
    """Whether the peer was put into the sandbox from outside: its parent is not in our PID namespace. What user code
    starts has its parent, or the agent, above it."""
    pid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid == 0 or process_state(pid)[1] == 0


def refusal(refused: Refused) -> Json:
    """The reply to a request that was refused."""
    return dict(refused.details, ok=False, code=refused.code, message=str(refused))


def text(fields: Json, name: str, default: Optional[str] = None) -> str:
    """A string field. Raises Refused `malformed`."""
    value = fields.get(name, default)
    if not isinstance(value, str):
        raise Refused("malformed", "{} is not a string".format(name))
    return value


def number(fields: Json, name: str, low: int = 0, high: int = 2**63, default: Optional[int] = None) -> int:
    """An integer field within bounds. Raises Refused `malformed`."""
    value = fields.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Refused("malformed", "{} is not an integer from {} to {}".format(name, low, high))
    return value


def _from_mark(fields: Json) -> Optional[int]:
    return None if fields.get("fromMark") is None else number(fields, "fromMark")


def _key(fields: Json) -> bytes:
    try:
        key = bytes.fromhex(text(fields, "key"))
    except ValueError:
        raise Refused("malformed", "the key is not hexadecimal") from None
    if len(key) != 32:
        raise Refused("malformed", "the key is not 32 bytes")
    return key


# The helpers -------------------------------------------------------------------------------------


class Pump:
    """`attach` and `control`: standard input to the agent's socket and back, until either side ends or falls silent.

    Bounded both ways: what one side does not take is not read from the other.
    """

    LIMIT = 256 * KIB

    def __init__(self, sock: socket.socket, silence: float) -> None:
        self._sock = sock
        self._silence = silence
        self._up = bytearray()
        self._down = bytearray()
        self._heard = {0: time.monotonic(), sock.fileno(): time.monotonic()}

    def run(self) -> None:
        """Pump until standard input or the socket ends, or one of them says nothing for too long."""
        self._sock.setblocking(False)
        os.set_blocking(1, False)
        sock = self._sock.fileno()
        while not self._dead():
            ready = self._wait(sock)
            if ready.get(0) and not self._fill(0, self._up):
                _empty(sock, self._up)
                return
            if ready.get(sock, 0) & ~select.POLLOUT and not self._fill(sock, self._down):
                self._last_words()
                return
            _empty(sock, self._up)
            _empty(1, self._down)

    def _dead(self) -> bool:
        return time.monotonic() - min(self._heard.values()) > self._silence

    def _wait(self, sock: int) -> Dict[int, int]:
        poll = select.poll()
        if len(self._up) < self.LIMIT:
            poll.register(0, select.POLLIN)
        mask = (select.POLLIN if len(self._down) < self.LIMIT else 0) | (select.POLLOUT if self._up else 0)
        if mask:
            poll.register(sock, mask)
        if self._down:
            poll.register(1, select.POLLOUT)
        patience = self._silence - (time.monotonic() - min(self._heard.values()))
        return dict(poll.poll(max(0.0, patience) * 1000 + 1))

    def _fill(self, fd: int, buffer: bytearray) -> bool:
        try:
            data = os.read(fd, 64 * KIB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._heard[fd] = time.monotonic()
        buffer += data
        return bool(data)

    def _last_words(self) -> None:
        """The agent has closed: give what it said last to a reader that still takes it."""
        deadline = time.monotonic() + min(self._silence, 5.0)
        while self._down and time.monotonic() < deadline:
            poll = select.poll()
            poll.register(1, select.POLLOUT)
            poll.poll(100)
            _empty(1, self._down)


def _empty(fd: int, buffer: bytearray) -> None:
    """Write what `fd` takes now. Raises OSError when nobody reads it any more."""
    try:  # contextlib would be a third of a helper's start
        while buffer:
            del buffer[: os.write(fd, buffer)]
    except BlockingIOError:
        pass


# The command line --------------------------------------------------------------------------------


USAGE = """usage: agent.py serve (--socket PATH | --listen-fd N) --workspace DIR --run-dir DIR [--limit NAME=VALUE ...]
                [--nice N] [--keepalive S] [--silence S] [--grace S] [--linger S] [--stranger S] [--status S]
       agent.py attach --socket PATH [--silence S]
       agent.py control --socket PATH [--silence S]

  --socket     where to listen or connect; @NAME is an abstract socket, which nobody can unlink
  --listen-fd  an inherited listening Unix socket
  --workspace  the user's directory, which is HOME too
  --run-dir    a private directory for the agent's small files
  --limit      resource limits of the shell, such as NPROC=128
  --nice       by how much the shell and what it runs gives way to the agent, 0 to 19
  --keepalive, --silence, --grace, --linger, --stranger, --status  seconds, see docs/agent-protocol.md
"""
_TIMES = ("keepalive", "silence", "grace", "linger", "stranger", "status")


def main(argv: Optional[List[str]] = None) -> int:
    """Be the agent or one of its helpers; returns the exit code."""
    prctl(PR_SET_DUMPABLE, 0)
    _give_back_memory()
    try:
        work = _work(sys.argv[1:] if argv is None else argv)
    except (LookupError, ValueError, AttributeError) as error:
        sys.stderr.write("agent.py: bad options: {}\n{}".format(error, USAGE))
        return 2
    return work()


def _work(words: Sequence[str]) -> Callable[[], int]:
    """What the command line asks for. Raises LookupError, ValueError or AttributeError if it is wrong."""
    verb = words[0]
    if verb == "serve":
        options = _options(words[1:], ("socket", "listen_fd", "workspace", "run_dir", "limit", "nice", *_TIMES))
        times = {name: float(options[name][-1]) for name in _TIMES if name in options}
        limits = dict(map(_limit, options.get("limit", [])))
        nice = int(options.get("nice", ["0"])[-1])
        settings = Settings(options["workspace"][-1], options["run_dir"][-1], limits, nice=nice, **times)
        if "listen_fd" in options:
            fd = int(options["listen_fd"][-1])
            return lambda: _serve(settings, lambda: socket.socket(fileno=fd))
        address = _address(options["socket"][-1])
        return lambda: _serve(settings, lambda: _listen(address))
    if verb in ("attach", "control"):
        options = _options(words[1:], ("socket", "silence"))
        address, silence = _address(options["socket"][-1]), float(options.get("silence", ["60"])[-1])
        return lambda: _help(verb, address, silence)
    raise ValueError(verb)


def _give_back_memory() -> None:
    """Compiling this file takes three times the memory that it leaves; glibc keeps that unless asked."""
    import ctypes

    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _options(words: Sequence[str], known: Sequence[str]) -> Dict[str, List[str]]:
    """The values of each option. Raises ValueError for an unknown one. argparse would be a third of a helper."""
    found: Dict[str, List[str]] = {}
    values: List[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = found.setdefault(name.replace("-", "_"), [])
            values.extend([value] if equals else [])
        else:
            values.append(word)
    unknown = sorted(set(found) - set(known))
    if unknown or (words and not words[0].startswith("--")):
        raise ValueError(unknown or words[0])
    return found


def _limit(item: str) -> Tuple[int, int]:
    name, _, value = item.partition("=")
    return int(getattr(resource, "RLIMIT_" + name)), int(value)


def _address(name: str) -> str:
    return "\0" + name[1:] if name.startswith("@") else name


def _listen(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(128)
    return listener


def _serve(settings: Settings, listen: Callable[[], socket.socket]) -> int:
    listener = listen()
    listener.set_inheritable(False)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    os.makedirs(settings.run_dir, 0o700, exist_ok=True)
    agent = Agent(listener, settings)
    agent.run()
    # a node that ends a pod for a reason of its own keeps that to itself if the pod seems to have done its work
    return 128 + signal.SIGTERM if agent.terminated else 0


def _help(verb: str, address: str, silence: float) -> int:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(address)
    except OSError as error:
        sys.stderr.write("agent {}: {}\n".format(verb, error))
        return 1
    with contextlib.suppress(OSError):
        Pump(sock, silence).run()
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
