"""A writer of an SQLite database that others write too, with full syncs.

Usage: writer.py DATABASE setup|check|NAME COUNT MODE. `setup` makes the database in this journal mode; NAME makes COUNT transactions in that
name; `check` looks whether the database is sound and everybody's COUNT transactions are in it (MODE: how many writers).
"""
import sqlite3
import sys


def tell(kind, error, trace):
    sys.__excepthook__(kind, error, trace)
    # The exact reason of "disk I/O error".
    print(getattr(error, "sqlite_errorname", ""), file=sys.stderr)


sys.excepthook = tell
path, name, count, mode = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
database = sqlite3.connect(path, timeout=120, isolation_level=None)
if name == "setup":
    # Going over to a write-ahead log does not wait for others, so it is done before there are any.
    database.execute(f"pragma journal_mode={mode}")
    database.execute("create table entries (writer text, number integer, filler blob)")
elif name == "check":
    assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    counts = dict(database.execute("select writer, count(*) from entries group by writer"))
    assert len(counts) == int(mode) and set(counts.values()) == {count}, counts
else:
    database.execute("pragma synchronous=full")
    for number in range(count):
        database.execute("begin immediate")
        (total,) = database.execute("select count(*) from entries").fetchone()
        database.execute("insert into entries values (?, ?, zeroblob(?))", (name, number, 1 + total % 5000))
        database.execute("commit")
