#!/bin/bash
. /share/guest-lib.sh

e=$(blockd attach e --server "$SERVER" --timeout 2s)
x=$(blockd attach x --server "$SERVER" --timeout 2s)
mkfs.ext4 -q "$e"
mkfs.xfs -q "$x"
mkdir -p /mnt/e /mnt/x
mount "$e" /mnt/e
mount "$x" /mnt/x
say "writing on ext4 ($e) and xfs ($x)"
writers=()
for fs in e x; do
    perl /share/writer.pl write /mnt/$fs /tmp/journal.$fs /tmp/stop &
    writers+=($!)
done
for n in $(seq "$KILLS"); do
    sleep "0.$((RANDOM % 10))"
    host kill
    # Everybody must get on before the next one.
    for fs in e x; do
        lines=$(wc -l </tmp/journal.$fs)
        for _ in $(seq 150); do
            [ "$(wc -l </tmp/journal.$fs)" -le $((lines + 4)) ] || break
            sleep 0.2
        done
        [ "$(wc -l </tmp/journal.$fs)" -gt $((lines + 4)) ] || fail "writing on $fs does not go on after kill $n"
    done
    [ $((n % 5)) != 0 ] || say "killed $n times"
done
host stop
sleep 2
say "stopped in good order and started again"
touch /tmp/stop
for writer in "${writers[@]}"; do wait "$writer" || fail "a writer failed"; done
[ "$(blockd attach e --server "$SERVER" 2>&1 | grep -c 'attached as')" = 1 ] || fail "the device did not stay"
for fs in e x; do
    umount /mnt/$fs
    [ $fs = e ] && device=$e || device=$x
    blockdev --flushbufs "$device"
    mount "$device" /mnt/$fs
    perl /share/writer.pl check /mnt/$fs /tmp/journal.$fs
    umount /mnt/$fs
done
e2fsck -fn "$e" >/tmp/fsck 2>&1 || { cat /tmp/fsck; fail "fsck.ext4"; }
xfs_repair -n "$x" >/tmp/fsck 2>&1 || { cat /tmp/fsck; fail "xfs_repair"; }
no_io_errors
cat /run/blockd/nbd0.log | tail -n 3
blockd detach e
blockd detach x
say "fsck clean, everything fsynced is there"
