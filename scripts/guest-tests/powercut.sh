#!/usr/bin/env bash
# What a power cut at any flush would leave: the guest's writes are recorded in front of the server, replayed on the host up to
# each flush, mounted there, compared with what the guest knew to be fsynced, and checked by fsck.
. "$(dirname "$0")/lib.sh"

[ "$(id -u)" = 0 ] || die "mounting images needs root"
fs=${1:-ext4}
# Replaying takes a third of a second for each flush; the long version looks at all of them.
points=${POINTS:-$([ -n "$long" ] && echo 0 || echo 25)}
size=$((512 << 20))
seconds=$([ -n "$long" ] && echo 30 || echo 8)

cat >"$work/check" <<CHECK
#!/bin/bash
set -eu
mount -o loop "\$1" "$work/mnt"
if ! perl "$here/writer.pl" check "$work/mnt" "\$2" >"$work/said" 2>&1; then
    umount "$work/mnt"
    cat "$work/said"
    exit 1
fi
umount "$work/mnt"
case $fs in
    ext4) e2fsck -fn "\$1" ;;
    xfs) xfs_repair -n "\$1" ;;
    btrfs) btrfs check --readonly "\$1" ;;
esac >"$work/said" 2>&1 || { cat "$work/said"; exit 1; }
CHECK
chmod +x "$work/check"
mkdir "$work/mnt" "$work/replay"
unmount() { ! mountpoint -q "$work/mnt" || umount "$work/mnt"; }
cleanups+=(unmount)

start_daemon --log-size 512MiB
ctl volume create disk --size $size >/dev/null
"$bin/nbd-record" proxy "127.0.0.1:$(cat "$work/port")" "$work/recording" "$work/addresses" &
children+=($!)
until [ -s "$work/addresses" ]; do sleep 0.05; done
{ read -r nbd; read -r marks; } <"$work/addresses"
guest --timeout "${TIMEOUT:-240}" --env RECORDER="10.0.2.2:${nbd##*:}" --env MARKS="10.0.2.2:${marks##*:}" --env FS="$fs" --env SECONDS_OF_LOAD="$seconds"
echo "recorded $(du -h "$work/recording" | cut -f1) of $fs"
"$bin/nbd-record" replay "$work/recording" "$work/replay" --size $size --after mounted --points "$points" --check "$work/check"
