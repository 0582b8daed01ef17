#!/usr/bin/env bash
# Mapped files: what one process writes through a mapping, others see through mappings, reads, and after a remount.
. "$(dirname "$0")/lib.sh"
here=$root/scripts/fs-tests

fs_make
fs_mount
truncate -s $((64 * 4096)) "$mnt/mapped"
python3 "$here/mapped.py" "$mnt/mapped" reader 2000 &
reader=$!
python3 "$here/mapped.py" "$mnt/mapped" writer 2000
wait $reader
before=$(sha256sum <"$mnt/mapped")
fs_umount
fs_check
fs_mount
[ "$before" = "$(sha256sum <"$mnt/mapped")" ] || { echo "what was written through a mapping is lost" >&2; exit 1; }
fs_umount
echo "2000 writes through a mapping, seen by another process and after a remount"
