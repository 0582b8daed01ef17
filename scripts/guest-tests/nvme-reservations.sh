#!/usr/bin/env bash
# Reservations keep a second host out, also after a restart of the daemon, until it takes them over.
. "$(dirname "$0")/lib.sh"

host_nqn() { status | jq -r ".volumes[] | select(.name == \"$1\").nqn"; }
host_restart() { kill_daemon KILL; start_daemon; }

nvme_port=$(free_port)
start_daemon --nvme "127.0.0.1:$nvme_port"
ctl volume create disk --size 64MiB >/dev/null
guest --timeout "${TIMEOUT:-300}" --env NVME_PORT="$nvme_port"
