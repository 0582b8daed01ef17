#!/usr/bin/env bash
# SQLite inside the mount: two processes that write the same database with full syncs, in both journal modes.
# Usage: sqlite.sh [TRANSACTIONS]
. "$(dirname "$0")/lib.sh"

transactions=${1:-100}
fs_make
fs_mount
cat >"$work/writer.py" <<'PYTHON'
import sqlite3, sys
sys.excepthook = lambda kind, error, trace: (sys.__excepthook__(kind, error, trace), print(getattr(error, "sqlite_errorname", "")))
path, name, count, mode = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
database = sqlite3.connect(path, timeout=120, isolation_level=None)
database.execute("pragma synchronous=full")
if name == "setup":
    # Going over to a write-ahead log does not wait for others, so it is done before there are any.
    database.execute(f"pragma journal_mode={mode}")
    database.execute("create table entries (writer text, number integer, filler blob)")
for number in range(count):
    database.execute("begin immediate")
    (total,) = database.execute("select count(*) from entries").fetchone()
    database.execute("insert into entries values (?, ?, zeroblob(?))", (name, number, 1 + total % 5000))
    database.execute("commit")
PYTHON
for mode in delete wal; do
    python3 "$work/writer.py" "$mnt/$mode.db" setup 0 $mode
    python3 "$work/writer.py" "$mnt/$mode.db" first "$transactions" $mode &
    first=$!
    python3 "$work/writer.py" "$mnt/$mode.db" second "$transactions" $mode
    wait $first
    python3 - "$mnt/$mode.db" "$transactions" <<'PYTHON'
import sqlite3, sys
database = sqlite3.connect(sys.argv[1])
assert database.execute("pragma integrity_check").fetchone() == ("ok",)
counts = dict(database.execute("select writer, count(*) from entries group by writer"))
assert counts == {"first": int(sys.argv[2]), "second": int(sys.argv[2])}, counts
PYTHON
done
fs_umount
fs_check
echo "2 writers, $transactions transactions each, journal modes delete and wal"
