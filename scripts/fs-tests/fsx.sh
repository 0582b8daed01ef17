#!/usr/bin/env bash
# fsx over FUSE: random reads, writes, truncations, mappings, holes and copies of one file, compared with what they must give.
# Usage: fsx.sh [OPERATIONS]
. "$(dirname "$0")/lib.sh"

operations=${1:-20000}
fsx=$(tool fsx 0.3.2)
fs_make
fs_mount
# Small and large files, with and without holes; the last one reaches across many pages and extents.
seed=${FSX_SEED:-$RANDOM}
for flen in 8192 262144 16777216; do
    cat >"$work/fsx.toml" <<TOML
flen = $flen
[opsize]
min = 1
max = $((flen / 4 > 262144 ? 262144 : flen / 4))
[weights]
close_open = 1
invalidate = 1
mapread = 2
mapwrite = 2
read = 4
write = 4
truncate = 1
fsync = 0.5
fdatasync = 0.5
posix_fallocate = 1
punch_hole = 1
sendfile = 1
posix_fadvise = 1
copy_file_range = 2
TOML
    "$fsx" -N "$operations" -S "$seed" -f "$work/fsx.toml" -P "$work" "$mnt/fsx" >"$work/out" 2>&1 || {
        tail -40 "$work/out"
        echo "fsx fails: FSX_SEED=$seed, $operations operations, a file of $flen bytes" >&2
        exit 1
    }
    # What the kernel kept must be what is on the disk.
    before=$(sha256sum <"$mnt/fsx")
    fs_umount
    fs_mount
    [ "$before" = "$(sha256sum <"$mnt/fsx")" ] || { echo "the file is another after a remount: FSX_SEED=$seed" >&2; exit 1; }
    rm "$mnt/fsx"
done
echo "3 files, $operations operations each, seed $seed"
fs_umount
fs_check
