#!/usr/bin/env bash
# Attaching, filesystems, trimming, growing, and what is refused.
. "$(dirname "$0")/lib.sh"

host_live() { status | jq '.volumes[] | select(.name == "disk").stats | .live_bytes // .live_blocks'; }
host_drain() { wait_drained; }
host_grow() { ctl volume resize disk 6GiB >/dev/null; }
host_shrink() { ctl volume resize swap 32MiB --shrink >/dev/null; }
host_swap() { ctl volume delete swap --yes --force >/dev/null && ctl volume create swap --size 64MiB >/dev/null; }
host_clients() { status | jq '.volumes[] | select(.name == "disk").clients'; }

start_daemon --log-size 1GiB
ctl volume create disk --size 4GiB >/dev/null
ctl volume create huge --size 8TiB >/dev/null
ctl volume create swap --size 64MiB >/dev/null
mkdir -p "$work/share"
tar -C "$root" -cf "$work/share/tree.tar" blockd/src blockd/tests docs scripts
# For a daemon in the guest: its log wants a disk with O_DIRECT.
truncate -s 1G "$work/scratch.img"
guest --timeout "${TIMEOUT:-400}" --mem 1536 --disk scratch="$work/scratch.img"
