#!/usr/bin/env bash
# Copies on a volume of the engine in fsd: they put nothing into the bucket, are there after a SIGKILL, and go their own way when written.
. "$(dirname "$0")/lib.sh"

place=(--data "$data" --engine log-size=256MiB --engine destage-age=1s)
mount_it() { "$fsd" mount "$mnt" --daemon "${place[@]}" >/dev/null; }
shared() { "$fsd" status --data "$data" --json | sed -n 's/.*"remap-bytes": *\([0-9]*\).*/\1/p'; }
bucket() { du -sk "$data/bucket" | cut -f 1; }
# Waits until the bucket has everything, and tells its KiB.
settled() {
    local last=-1 now tries=0
    sync -f "$mnt"
    while now=$(bucket) && [ "$now" != "$last" ]; do
        last=$now
        sleep 3
        tries=$((tries + 1))
        [ $tries -lt 40 ] || { echo "the bucket keeps growing" >&2; return 1; }
    done
    echo "$now"
}

"$fsd" mkfs "${place[@]}" >/dev/null
mount_it
dd if=/dev/urandom of="$mnt/from" bs=1M count=64 conv=fsync status=none
before=$(settled)
[ "$before" -gt 60000 ] || { echo "the bucket has only $before KiB" >&2; exit 1; }

cp "$mnt/from" "$mnt/to"
[ "$(shared)" = $((64 << 20)) ] || { echo "$(shared) bytes were shared" >&2; exit 1; }
sync "$mnt/to"
fs_kill
mount_it
cmp "$mnt/from" "$mnt/to"
after=$(settled)
[ $((after - before)) -lt 2048 ] || { echo "the copy took $((after - before)) KiB of the bucket" >&2; exit 1; }

# Each changes by itself, and the copy outlives its source.
cp "$mnt/to" "$work/expected"
dd if=/dev/urandom of="$work/piece" bs=1M count=1 status=none
dd if="$work/piece" of="$mnt/from" bs=1M seek=3 conv=notrunc,fsync status=none
cmp "$work/expected" "$mnt/to"
for to in "$mnt/to" "$work/expected"; do dd if="$work/piece" of="$to" bs=1000 seek=7777 conv=notrunc,fsync status=none; done
rm "$mnt/from"
settled >/dev/null
fs_umount
mount_it
cmp "$work/expected" "$mnt/to"
fs_umount
"$fsd" check "${place[@]}" >"$work/check" 2>&1 || { cat "$work/check" >&2; exit 1; }
echo "64 MiB copied with $((after - before)) KiB in the bucket"
