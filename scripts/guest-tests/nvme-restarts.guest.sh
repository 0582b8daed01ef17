#!/bin/bash
. /share/guest-lib.sh
. /share/nvme-lib.sh

nqn=$(host nqn disk)
connect "$nqn"
disk=$(disk_of "$nqn")
mkfs.ext4 -q "$disk"
mkdir -p /mnt/e
mount "$disk" /mnt/e
perl /share/writer.pl write /mnt/e /tmp/journal /tmp/stop &
writer=$!
wait_for '[ -s /tmp/journal ]' || fail "nothing is written"
for n in $(seq "$KILLS"); do
    sleep "0.$((RANDOM % 10))"
    host kill
    lines=$(wc -l </tmp/journal)
    wait_for '[ "$(wc -l </tmp/journal)" -gt $((lines + 4)) ]' || fail "writing does not go on after kill $n"
    [ $((n % 5)) != 0 ] || say "killed $n times"
done
host stop
sleep 2
say "stopped in good order and started again"
touch /tmp/stop
wait $writer || fail "the writer failed"
umount /mnt/e
blockdev --flushbufs "$disk"
mount "$disk" /mnt/e
perl /share/writer.pl check /mnt/e /tmp/journal
umount /mnt/e
e2fsck -fn "$disk" >/tmp/fsck 2>&1 || { cat /tmp/fsck; fail "fsck.ext4"; }
no_io_errors
nvme disconnect -n "$nqn" >/dev/null
say "fsck clean, everything fsynced is there"
