"""Every limit of the system: a name, a unit, a reason. Deployments change `Limits`; the constants are fixed
by what the clouds or the stored format allow."""

from __future__ import annotations

from datetime import timedelta

from pydantic import BaseModel, ConfigDict

KIB = 1024
MIB = 1024 * KIB

MAX_CHUNK_BYTES = 256 * KIB  # Firestore caps a document at 1 MiB; leave headroom
MAX_DOCUMENT_BYTES = 1 * MIB  # Firestore
MAX_COMMIT_BYTES = 10 * MIB  # Firestore
MAX_MESSAGE_BYTES = 9_900_000  # Pub/Sub takes 10,000,000 in a publish request, its own fields included
MAX_ATTRIBUTE_BYTES = 1024  # Pub/Sub, for each value
MAX_COMMAND_BYTES = 64 * KIB  # UTF-8
MAX_INPUT_BYTES = 64 * KIB  # one send-input
MAX_BODY_BYTES = 8 * MIB  # one HTTP request
MAX_FILES = 1_000  # in one push
MAX_FILE_BYTES = 4 * MIB  # one pushed or read file
MAX_PUSH_BYTES = 6 * MIB  # all contents of one push, decoded: base64 and JSON still fit a message
MAX_PATH_BYTES = 1_024  # UTF-8, relative to /workspace
MAX_LISTED_FILES = 10_000  # in one listing
MAX_CHANGED_FILES = 200  # named on one command's document
MAX_ROWS, MAX_COLS = 500, 1_000  # a terminal's size, in cells
MAX_COMMAND_TIMEOUT_SECONDS = 6 * 3600
MAX_LONG_POLL_SECONDS = 25.0
MAX_POLL_BYTES = 1 * MIB  # output in one terminal-get-output answer
MAX_TOKEN_BYTES = 8 * KIB


class Limits(BaseModel):
    """What a deployment may tune. Times are durations, sizes are bytes."""

    model_config = ConfigDict(frozen=True)

    sessions_per_user: int = 5
    capacity: int = 20  # sandboxes at once, warm ones not counted
    pool_size: int = 1  # warm sandboxes kept ready
    idle_timeout: timedelta = timedelta(minutes=15)
    idle_warning: timedelta = timedelta(minutes=2)  # how long before the close the warning shows
    session_lifetime: timedelta = timedelta(hours=8)
    start_timeout: timedelta = timedelta(minutes=5)
    request_timeout: timedelta = timedelta(seconds=30)  # a 'requested' older than this is published again
    closing_grace: timedelta = timedelta(seconds=30)
    orphan_grace: timedelta = timedelta(minutes=1)
    tended_stale: timedelta = timedelta(seconds=60)  # a tender that has not signed for this long is replaced
    tended_every: timedelta = timedelta(seconds=15)
    retention: timedelta = timedelta(days=30)  # transcripts, counted from the session's longest life
    command_timeout: timedelta = timedelta(hours=1)
    command_running_after: timedelta = timedelta(milliseconds=250)  # shorter ones are never written as running
    spool_bytes: int = 8 * MIB  # uncommitted output; beyond it the program blocks
    output_bytes: int = 64 * MIB  # a session's output budget; beyond it output is discarded with a mark
    workspace_bytes: int = 256 * MIB
    memory_bytes: int = 512 * MIB
    processes: int = 128
    file_bytes: int = 256 * MIB  # one file, RLIMIT_FSIZE
