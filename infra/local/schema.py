"""The one SQLite file of the embedded profile: how it is opened and what its tables are."""

from __future__ import annotations

import os
import random
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

from schemas.errors import PigeonError

SCHEMA_VERSION = 1
APPLICATION_ID = 0x70696765  # "pige": tells our file from any other SQLite file
AUTO_CHECKPOINT_PAGES = 20_000  # a net only: the keeper checkpoints long before, off the way of commits
JOURNAL_SIZE_LIMIT = 64 * 1024 * 1024  # bytes of log file kept for reuse

TABLES = """
CREATE TABLE counter (value INTEGER NOT NULL);
INSERT INTO counter VALUES (0);

CREATE TABLE documents (
    collection TEXT NOT NULL,
    id TEXT NOT NULL,
    version INTEGER NOT NULL,
    expires INTEGER,            -- microseconds since the epoch
    body BLOB NOT NULL,         -- msgpack
    PRIMARY KEY (collection, id)
) WITHOUT ROWID;
CREATE INDEX expiring ON documents (expires) WHERE expires IS NOT NULL;

CREATE TABLE entries (          -- one row for each document and declared index
    collection TEXT NOT NULL,
    fields TEXT NOT NULL,
    key BLOB NOT NULL,
    id TEXT NOT NULL,
    PRIMARY KEY (collection, fields, key, id)
) WITHOUT ROWID;
CREATE TABLE indexes (          -- what `entries` was built for
    collection TEXT NOT NULL,   -- the last segment
    fields TEXT NOT NULL,
    PRIMARY KEY (collection, fields)
) WITHOUT ROWID;

CREATE TABLE messages (
    id INTEGER PRIMARY KEY,
    topic TEXT NOT NULL,
    ordering_key TEXT NOT NULL,
    published INTEGER NOT NULL, -- microseconds since the epoch
    pending INTEGER NOT NULL,   -- subscriptions that have not settled it
    attributes BLOB NOT NULL,   -- msgpack
    data BLOB NOT NULL
);
CREATE TABLE deliveries (
    subscription TEXT NOT NULL,
    ordering_key TEXT NOT NULL, -- '' in an unordered subscription
    message INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    turn INTEGER NOT NULL,      -- first come, first served among those that are due
    due INTEGER,                -- 0: now; a time in microseconds: then; NULL: after the one before it of its key
    holder INTEGER,             -- the subscriber of the last lease
    PRIMARY KEY (subscription, ordering_key, message)
) WITHOUT ROWID;
CREATE INDEX ready ON deliveries (subscription, due, turn) WHERE due IS NOT NULL;
"""


class UnknownSchema(PigeonError):
    """The file was written by a newer version of this program, or by another program; it is left as it is."""

    code = "unknown_schema"


def is_busy(error: sqlite3.Error) -> bool:
    """Whether somebody else holds a lock of the file; trying again helps."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def execute_patiently(connection: sqlite3.Connection, sql: str, timeout: float) -> None:
    """Execute, trying again for `timeout` seconds while the file is locked; then the sqlite3.Error is raised.

    SQLite's own waiting starts at a millisecond and grows fast, ten times the length of our transactions.
    """
    end = time.monotonic() + timeout
    pause = 0.0001
    while True:
        try:
            connection.execute(sql)
            return
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() >= end:
                raise
        time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
        pause = min(pause * 1.5, 0.002)


def connect(path: Path, lock_timeout: float) -> sqlite3.Connection:
    """A connection for one thread, in autocommit. Raises sqlite3.Error. It waits `lock_timeout` seconds for locks."""
    connection = sqlite3.connect(path, timeout=lock_timeout, isolation_level=None, cached_statements=256)
    connection.execute("PRAGMA synchronous = NORMAL")  # survives a killed process, not a power cut
    connection.execute("PRAGMA temp_store = MEMORY")  # the journals of savepoints
    connection.execute(f"PRAGMA wal_autocheckpoint = {AUTO_CHECKPOINT_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {JOURNAL_SIZE_LIMIT}")
    return connection


def prepare(path: Path, lock_timeout: float) -> None:
    """Create the file and its tables where they are missing; any number of processes may do so at once.

    Raises UnknownSchema, or sqlite3.Error or OSError when the file cannot be read or written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _create_private(path)
    connection = sqlite3.connect(path, timeout=lock_timeout, isolation_level=None)
    try:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        execute_patiently(connection, "PRAGMA journal_mode = WAL", lock_timeout)
        execute_patiently(connection, "BEGIN IMMEDIATE", lock_timeout)
        _create_tables(connection, path)
        connection.execute("COMMIT")
    finally:
        connection.close()


def _create_private(path: Path) -> None:
    """Make the file readable by its owner only; what people typed is in it."""
    with suppress(FileExistsError):  # never opened then: closing it would drop the locks of other connections here
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _create_tables(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchall()[0]
    (application,) = connection.execute("PRAGMA application_id").fetchall()[0]
    if version == SCHEMA_VERSION and application == APPLICATION_ID:
        return
    if version or application or connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall():
        raise UnknownSchema(
            f"{path} has schema {version} of application {application:#x}; this program knows schema "
            f"{SCHEMA_VERSION} of {APPLICATION_ID:#x}: use the newer program, or another file"
        )
    for statement in TABLES.split(";\n"):
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
