#!/usr/bin/env bash
# The kernel's own NVMe/TCP initiator: discovery, file systems, discard, resize, two paths.
. "$(dirname "$0")/lib.sh"

host_resize() { ctl volume resize "$1" "$2" >/dev/null; }
host_create() { ctl volume create "$1" --size "$2" >/dev/null; }
host_delete() { ctl volume delete "$1" --yes --force >/dev/null; }
host_snapshot() { ctl snapshot create "$1" >/dev/null; }
host_snapshot_nqn() { ctl connect-info "$1" --json | jq -r .nqn; }
host_nqn() { status | jq -r ".volumes[] | select(.name == \"$1\").nqn"; }
host_stored() { wait_drained; stat_of "$1" live_bytes; }

nvme_port=$(free_port)
start_daemon --log-size 512MiB --nvme "127.0.0.1:$nvme_port"
ctl volume create disk --size 1GiB >/dev/null
guest --timeout "${TIMEOUT:-600}" --env NVME_PORT="$nvme_port"
