#!/usr/bin/env bash
# blockd over NVMe/TCP beside the kernel's own target (nvmet-tcp) on a file: both in the guest, on one disk, driven by its
# initiator. Reports how they compare; processors are emulated, so only the ratios mean something.
. "$(dirname "$0")/lib.sh"

truncate -s 4G "$work/scratch.raw"
echo 0 >"$work/port"
guest --timeout "${TIMEOUT:-900}" --mem 2048 --disk scratch="$work/scratch.raw" --env ROUNDS="${ROUNDS:-3}" --env SECONDS_EACH="${SECONDS_EACH:-4}"
