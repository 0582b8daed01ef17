#!/bin/bash
. /share/guest-lib.sh

device=$(blockd attach disk --server "$SERVER" --timeout 5s)
mkfs.ext4 -q "$device"
mount "$device" /mnt
head -c 20000000 /dev/urandom >/mnt/before
md5sum </mnt/before >/tmp/before.sum
sync -f /mnt
host drain
mkdir /mnt/d
perl /share/writer.pl write /mnt/d /tmp/journal /tmp/stop &
writer=$!
dd if=/dev/urandom of=/mnt/big bs=1M count=400 conv=fsync 2>/tmp/dd &
bulk=$!
until [ -e /tmp/journal ] && [ "$(wc -l </tmp/journal)" -gt 10 ]; do sleep 0.2; done
host away
say "the bucket is away"
# What neither the guest nor the daemon remembers is waited for as well.
echo 3 >/proc/sys/vm/drop_caches
md5sum </mnt/before >/tmp/after.sum &
reader=$!
start=$SECONDS
moved=$SECONDS
longest=0
last=
# At least so long, and longer where the guest is slow to fill the log.
while [ $((SECONDS - start)) -lt "$AWAY" ] || { [ "$longest" -lt 5 ] && [ $((SECONDS - start)) -lt $((AWAY * 6)) ]; }; do
    now=$(wc -l </tmp/journal)
    if [ "$now" != "$last" ]; then
        last=$now
        moved=$SECONDS
    fi
    [ $((SECONDS - moved)) -le "$longest" ] || longest=$((SECONDS - moved))
    sleep 1
done
say "for up to $longest s nothing got on; the host says $(host trouble)"
[ "$longest" -ge 5 ] || fail "the log never got full"
host back
lines=$(wc -l </tmp/journal)
for _ in $(seq 120); do
    [ "$(wc -l </tmp/journal)" -le $((lines + 20)) ] || break
    sleep 0.5
done
[ "$(wc -l </tmp/journal)" -gt $((lines + 20)) ] || fail "writing does not go on"
say "the bucket is back, and writing goes on"
wait $bulk || { cat /tmp/dd; fail "the bulk writer failed"; }
wait $reader || fail "the reader failed"
cmp /tmp/before.sum /tmp/after.sum
touch /tmp/stop
wait $writer || fail "the writer failed"
umount /mnt
blockdev --flushbufs "$device"
mount "$device" /mnt
perl /share/writer.pl check /mnt/d /tmp/journal
umount /mnt
e2fsck -fn "$device" >/tmp/fsck 2>&1 || { cat /tmp/fsck; fail "fsck"; }
no_io_errors
blockd detach disk
say "no error, fsck clean"
