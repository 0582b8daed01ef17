#!/usr/bin/env bash
# The daemon is killed and started again while the guest writes and fsyncs on ext4 over NVMe/TCP, and once stopped in good order.
. "$(dirname "$0")/lib.sh"

host_kill() { kill_daemon KILL; start_daemon; }
host_stop() { kill_daemon TERM; start_daemon; }
host_nqn() { status | jq -r ".volumes[] | select(.name == \"$1\").nqn"; }

nvme_port=$(free_port)
start_daemon --log-size 512MiB --nvme "127.0.0.1:$nvme_port"
ctl volume create disk --size 1GiB >/dev/null
guest --timeout "${TIMEOUT:-600}" --env KILLS="${KILLS:-20}" --env NVME_PORT="$nvme_port"
