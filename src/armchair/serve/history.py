"""What was drawn in the studio, kept in one SQLite file: searched, starred, deleted, and there after a restart."""

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armchair.errors import RequestError, WorkError

FORMAT = 1
MAX_ENTRIES = 1000  # past it the oldest without a favourite go
PAGE = 30  # entries that a list has at once
UNDO = 600.0  # seconds for which what was deleted can be brought back

_SCHEMA = """
CREATE TABLE entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, kind TEXT NOT NULL, prompt TEXT NOT NULL,
    candidates INTEGER NOT NULL, parent INTEGER, deleted REAL
);
CREATE TABLE pictures (
    id INTEGER PRIMARY KEY AUTOINCREMENT, entry INTEGER NOT NULL REFERENCES entries (id) ON DELETE CASCADE,
    prompt TEXT NOT NULL, score REAL, record TEXT NOT NULL, favourite INTEGER NOT NULL DEFAULT 0, png BLOB NOT NULL
);
CREATE INDEX pictures_of ON pictures (entry);
"""
_KEPT = "id, entry, prompt, score, favourite, record"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A picture of an entry; its file is asked for by `History.png`. `record` is that of the file."""

    id: int
    entry: int
    prompt: str
    score: float | None
    favourite: bool
    record: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Pictures that were asked for together, in the order in which they are shown.

    kind: draw, grid (`prompt` has choices, and there is a picture a combination) or complete (of the picture `parent`).
    """

    id: int
    at: float  # seconds since 1970
    kind: str
    prompt: str
    candidates: int  # as asked for
    parent: int | None
    pictures: list[Kept]


class History:
    """Safe to be used by several threads and processes at once, and to be stopped at any moment."""

    def __init__(self, path: Path, limit: int = MAX_ENTRIES):
        """Open `path`, or make it. What was deleted before is gone from then on.

        Raises RequestError for another file, for one of a newer format, and where none can be made.
        """
        self.path, self.limit = path, limit
        self._writing = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._store() as store:
                store.execute("PRAGMA journal_mode = WAL")
                store.execute("BEGIN IMMEDIATE")
                (found,) = store.execute("PRAGMA user_version").fetchone()
                if found == 0 and not store.execute("SELECT 1 FROM sqlite_master").fetchone():
                    for statement in _SCHEMA.split(";"):
                        store.execute(statement)
                    store.execute(f"PRAGMA user_version = {FORMAT}")
                elif found != FORMAT:
                    raise RequestError(f"{path}: a history of format {found}, this armchair has {FORMAT}")
                store.execute("DELETE FROM entries WHERE deleted IS NOT NULL")
        except OSError as error:
            raise RequestError(f"cannot keep a history in {path}: {error.strerror}") from None
        except sqlite3.DatabaseError as error:
            raise RequestError(f"{path}: cannot be used as a history: {error}") from None

    def add(
        self,
        kind: str,
        prompt: str,
        candidates: int,
        pictures: Sequence[tuple[dict[str, Any], bytes]],
        parent: int | None = None,
    ) -> Entry:
        """Keep pictures, each its record and its PNG. Raises WorkError on a full disk."""
        now = time.time()
        with self._changes() as store:
            entry = store.execute(
                "INSERT INTO entries (at, kind, prompt, candidates, parent) VALUES (?, ?, ?, ?, ?)",
                (now, kind, prompt, candidates, parent),
            ).lastrowid
            store.executemany(
                "INSERT INTO pictures (entry, prompt, score, record, png) VALUES (?, ?, ?, ?, ?)",
                [(entry, record["prompt"], record.get("score"), json.dumps(record), png) for record, png in pictures],
            )
            store.execute("DELETE FROM entries WHERE deleted < ?", (now - UNDO,))
            store.execute(
                "DELETE FROM entries WHERE id IN (SELECT id FROM entries e WHERE deleted IS NULL AND NOT EXISTS "
                "(SELECT 1 FROM pictures WHERE entry = e.id AND favourite) ORDER BY id DESC LIMIT -1 OFFSET ?)",
                (self.limit,),
            )
        return self.entry(int(entry or 0))

    def entries(self, search: str = "", *, favourites: bool = False, before: int | None = None) -> list[Entry]:
        """The newest PAGE entries, those older than the entry `before`; all words of `search` are in their prompts.

        With `favourites`, those that have one, and of them the favourites alone.
        """
        conditions, values = ["deleted IS NULL"], []
        for word in search.split():
            pattern = "%" + "".join("\\" + c if c in "%_\\" else c for c in word) + "%"
            within = "SELECT 1 FROM pictures p WHERE p.entry = entries.id AND p.prompt LIKE ? ESCAPE '\\'"
            conditions.append(f"(prompt LIKE ? ESCAPE '\\' OR EXISTS ({within}))")
            values += [pattern, pattern]
        if favourites:
            conditions.append("EXISTS (SELECT 1 FROM pictures p WHERE p.entry = entries.id AND favourite)")
        if before is not None:
            conditions.append("id < ?")
            values.append(before)  # type: ignore[arg-type]
        where = " AND ".join(conditions)
        with self._store() as store:
            rows = store.execute(f"SELECT id FROM entries WHERE {where} ORDER BY id DESC LIMIT {PAGE}", values)
            return [self._entry(store, id, favourites) for (id,) in rows.fetchall()]

    def entry(self, id: int) -> Entry:
        """Raises RequestError where there is none, or it is deleted."""
        with self._store() as store:
            return self._entry(store, id)

    def picture(self, id: int) -> Kept:
        """Raises RequestError where there is none, or it is deleted."""
        with self._store() as store:
            row = store.execute(
                f"SELECT {_KEPT} FROM pictures WHERE id = ? "
                "AND entry IN (SELECT id FROM entries WHERE deleted IS NULL)",
                (id,),
            ).fetchone()
        if row is None:
            raise RequestError(f"there is no picture {id} in the history; it may have been deleted")
        return _kept(row)

    def png(self, id: int) -> bytes:
        """The file of a picture, as it is saved, with its record. Raises as `picture`."""
        self.picture(id)
        with self._store() as store:
            row = store.execute("SELECT png FROM pictures WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise RequestError(f"picture {id} has just been deleted")
        return bytes(row["png"])

    def set_favourite(self, picture: int, favourite: bool) -> None:
        """Raises RequestError where there is no such picture."""
        with self._changes() as store:
            if not store.execute("UPDATE pictures SET favourite = ? WHERE id = ?", (favourite, picture)).rowcount:
                raise RequestError(f"there is no picture {picture} in the history; it may have been deleted")

    def delete(self, entry: int) -> None:
        """Take an entry out; for UNDO seconds `restore` can bring it back. Raises RequestError where there is none."""
        self._mark(entry, time.time())

    def restore(self, entry: int) -> None:
        """Raises RequestError where it is gone."""
        self._mark(entry, None)

    def _mark(self, entry: int, deleted: float | None) -> None:
        with self._changes() as store:
            if not store.execute("UPDATE entries SET deleted = ? WHERE id = ?", (deleted, entry)).rowcount:
                raise RequestError(f"there is no entry {entry} in the history any more")

    def _entry(self, store: sqlite3.Connection, id: int, favourites: bool = False) -> Entry:
        row = store.execute("SELECT * FROM entries WHERE id = ? AND deleted IS NULL", (id,)).fetchone()
        if row is None:
            raise RequestError(f"there is no entry {id} in the history; it may have been deleted")
        only = " AND favourite" if favourites else ""
        rows = store.execute(f"SELECT {_KEPT} FROM pictures WHERE entry = ?{only} ORDER BY id", (id,))
        told: dict[str, Any] = {name: row[name] for name in ("id", "at", "kind", "prompt", "candidates", "parent")}
        return Entry(**told, pictures=[_kept(picture) for picture in rows])

    @contextlib.contextmanager
    def _changes(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._writing, self._store() as store:
                yield store
        except sqlite3.OperationalError as error:
            raise WorkError(f"the history in {self.path} could not be written: {error}") from None

    @contextlib.contextmanager
    def _store(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self.path, timeout=30)) as store:
            store.row_factory = sqlite3.Row
            store.execute("PRAGMA foreign_keys = ON")
            store.execute("PRAGMA secure_delete = ON")  # what is deleted leaves nothing behind
            with store:
                try:
                    yield store
                except OverflowError:  # a number of more than 64 bits
                    raise RequestError("there is no such number in the history") from None


def _kept(row: sqlite3.Row) -> Kept:
    told: dict[str, Any] = {name: row[name] for name in ("id", "entry", "prompt", "score")}
    return Kept(**told, favourite=bool(row["favourite"]), record=json.loads(row["record"]))
