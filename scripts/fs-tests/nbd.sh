#!/usr/bin/env bash
# A filesystem on a volume of a blockd that is killed with SIGKILL under load and started again: calls wait and go on, and nobody sees
# an error.
# Usage: nbd.sh [KILLS]
. "$(dirname "$0")/lib.sh"

kills=${1:-3}
blockd=${BLOCKD:-$(dirname "$fsd")/blockd}
[ -x "$blockd" ] || { echo "no $blockd; build it first: cargo build --release --workspace" >&2; exit 1; }
blockd_pid=
blockd_start() {
    "$blockd" serve --data "$work/blockd" --nbd-tcp none >>"$work/blockd.log" 2>&1 &
    blockd_pid=$!
    local tries=0
    until "$blockd" volume list --data "$work/blockd" >/dev/null 2>&1; do
        sleep 0.1
        tries=$((tries + 1))
        [ $tries -lt 100 ] || { cat "$work/blockd.log" >&2; return 1; }
    done
}
trap '[ -z "$blockd_pid" ] || kill -9 "$blockd_pid" 2>/dev/null; cleanup' EXIT
blockd_start
"$blockd" volume create fs --size 1048576TiB --data "$work/blockd" >/dev/null
url="nbd+unix:///fs?socket=$work/blockd/nbd.sock"
"$fsd" mkfs --nbd "$url" --data "$data" >/dev/null
"$fsd" mount "$mnt" --nbd "$url" --data "$data" --daemon >/dev/null
python3 "$(dirname "$0")/load.py" run "$mnt" "$work/log" 1 3 &
load=$!
for _ in $(seq "$kills"); do
    sleep 2
    kill -9 "$blockd_pid"
    wait "$blockd_pid" 2>/dev/null || true
    sleep 0.5
    kill -0 $load || { echo "the load saw blockd go away" >&2; exit 1; }
    blockd_start
done
before=$(cat "$work"/log.* | wc -l)
sleep 2
[ "$(cat "$work"/log.* | wc -l)" -gt "$before" ] || { echo "nothing goes on after blockd is back" >&2; exit 1; }
# What was synced is there after fsd is killed too, while blockd stays.
fs_kill
wait $load || { echo "the load failed before fsd was killed" >&2; exit 1; }
"$fsd" check --nbd "$url" --data "$data" >"$work/check" 2>&1 || { cat "$work/check" >&2; exit 1; }
"$fsd" mount "$mnt" --nbd "$url" --data "$data" --daemon >/dev/null
python3 "$(dirname "$0")/load.py" verify "$mnt" "$work/log"
fs_umount
"$fsd" check --nbd "$url" --data "$data" >"$work/check" 2>&1 || { cat "$work/check" >&2; exit 1; }
kill "$blockd_pid"
wait "$blockd_pid" || true
blockd_pid=
echo "blockd killed $kills times, fsd once; $(cat "$work"/log.* | wc -l) notes checked"
