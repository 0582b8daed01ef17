#!/usr/bin/env bash
# The kernel's own NFS client against fsd on a bucket in a directory: versions 4.2, 4.1 and 3, and an fsd that is killed.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/nfs-lib.sh"

fsd_place() {
    echo --data "$work/fsd" --engine log-size=256MiB --engine log-segment=16MiB --engine block-cache=64MiB --engine destage-age=1s
}
mkfs_options=()
fsd_test --timeout "${TIMEOUT:-600}"
