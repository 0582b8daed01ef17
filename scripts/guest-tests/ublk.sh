#!/usr/bin/env bash
# A volume as /dev/ublkbN, from a daemon in the guest that is killed and started again while ext4 is written to and fsynced.
. "$(dirname "$0")/lib.sh"

# The guest's own daemon serves the volume; the one here is what scripts/guest and lib.sh expect.
start_daemon --log-size 128MiB
truncate -s 3G "$work/scratch.img"
guest --timeout "${TIMEOUT:-400}" --mem 1536 --disk scratch="$work/scratch.img" --env KILLS="${KILLS:-5}"
