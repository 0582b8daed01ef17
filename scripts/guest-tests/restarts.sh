#!/usr/bin/env bash
# The daemon is killed and started again while the guest writes and fsyncs on ext4 and xfs, and once stopped in good order.
. "$(dirname "$0")/lib.sh"

host_kill() { kill_daemon KILL; start_daemon; }
host_stop() { kill_daemon TERM; start_daemon; }

start_daemon --log-size 512MiB
for volume in e x; do ctl volume create $volume --size 1GiB >/dev/null; done
guest --timeout "${TIMEOUT:-600}" --env KILLS="${KILLS:-20}"
