#!/usr/bin/env bash
# SQLite inside the mount: two processes that write the same database with full syncs, in both journal modes.
# Usage: sqlite.sh [TRANSACTIONS]
. "$(dirname "$0")/lib.sh"

transactions=${1:-100}
fs_make
fs_mount
writer=$root/scripts/fs-tests/writer.py
for mode in delete wal; do
    python3 "$writer" "$mnt/$mode.db" setup 0 $mode
    python3 "$writer" "$mnt/$mode.db" first "$transactions" $mode &
    first=$!
    python3 "$writer" "$mnt/$mode.db" second "$transactions" $mode
    wait $first
    python3 "$writer" "$mnt/$mode.db" check "$transactions" 2
done
fs_umount
fs_check
echo "2 writers, $transactions transactions each, journal modes delete and wal"
