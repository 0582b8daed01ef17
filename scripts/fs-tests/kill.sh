#!/usr/bin/env bash
# Kills fsd with SIGKILL under load, again and again. What was synced must be there, names and contents; nothing may be
# half done; fsd check must find nothing.
# Usage: kill.sh [ROUNDS]
. "$(dirname "$0")/lib.sh"

rounds=${1:-5}
fs_make
for round in $(seq "$rounds"); do
    fs_mount
    python3 "$(dirname "$0")/load.py" verify "$mnt" "$work/log"
    python3 "$(dirname "$0")/load.py" run "$mnt" "$work/log" "$round" 3 &
    load=$!
    sleep "$(python3 -c 'import random; print(random.uniform(0.3, 3))')"
    fs_kill
    wait $load || { echo "the load failed before the kill" >&2; exit 1; }
    fs_check
done
fs_mount
python3 "$(dirname "$0")/load.py" verify "$mnt" "$work/log"
fs_umount
fs_check
echo "killed $rounds times; $(cat "$work"/log.* | wc -l) synced operations checked"
