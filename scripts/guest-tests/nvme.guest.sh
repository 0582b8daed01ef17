#!/bin/bash
. /share/guest-lib.sh
. /share/nvme-lib.sh

nqn=$(host nqn disk)
say "discover"
nvme discover -t tcp -a 10.0.2.2 -s "$NVME_PORT" >/tmp/discovery
grep -q "subnqn: *$nqn" /tmp/discovery || { cat /tmp/discovery; fail "the volume is not discovered"; }

say "connect, with digests and several queues"
connect "$nqn" --hdr-digest --data-digest --nr-io-queues=2
disk=$(disk_of "$nqn")
[ "$(blockdev --getsize64 "$disk")" = $((1 << 30)) ] || fail "$disk has another size"
[ "$(cat /sys/block/"${disk#/dev/}"/queue/physical_block_size)" = 4096 ] || fail "physical blocks"
[ "$(cat /sys/block/"${disk#/dev/}"/queue/write_cache)" = "write back" ] || fail "no write cache"
[ "$(cat /sys/block/"${disk#/dev/}"/queue/discard_max_bytes)" -gt 0 ] || fail "no discard"
[ "$(cat /sys/block/"${disk#/dev/}"/queue/write_zeroes_max_bytes)" -gt 0 ] || fail "no write zeroes"
nvme id-ns "$disk" >/dev/null
nvme id-ctrl "$disk" >/dev/null
nvme smart-log "$disk" >/dev/null

say "mkfs, fio with verification, fsck"
mkfs.ext4 -q "$disk"
mkdir -p /mnt/e
mount "$disk" /mnt/e
fio --name=verify --directory=/mnt/e --size=64m --rw=randrw --bsrange=512-256k --bs_unaligned=1 --ioengine=libaio --iodepth=16 \
    --verify=crc32c --verify_fatal=1 --do_verify=1 --fsync=64 --time_based=0 --output=/tmp/fio || { cat /tmp/fio; fail fio; }
rm -rf /mnt/e/verify*
sync
fstrim /mnt/e
umount /mnt/e
e2fsck -fn "$disk" >/tmp/fsck 2>&1 || { cat /tmp/fsck; fail "fsck.ext4"; }
fio --name=raw --filename="$disk" --size=96m --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=32 \
    --verify=crc32c --verify_fatal=1 --do_verify=1 --output=/tmp/fio || { cat /tmp/fio; fail "fio on the disk"; }

say "discard and write zeroes free space"
before=$(host stored disk)
blkdiscard "$disk"
after=$(host stored disk)
[ "$after" -lt $((before / 4)) ] || fail "$before bytes lived before the discard, $after after"
dd if=/dev/urandom of="$disk" bs=1M count=8 oflag=direct status=none
blkdiscard --zeroout --offset 1048576 --length 4194304 "$disk"
cmp -n 4194304 --ignore-initial=1048576:0 "$disk" /dev/zero || fail "not zeroed"

say "a new size is seen without connecting again"
host resize disk 1280MiB
wait_for '[ "$(blockdev --getsize64 '"$disk"')" = $((1280 << 20)) ]' || fail "the new size is not seen"

say "two paths to one daemon"
dmesg -C
# nvme-cli finds itself connected already.
by_hand "$nqn" "$(cat /etc/nvme/hostnqn)" "$(cat /etc/nvme/hostid)" duplicate_connect
[ "$(controllers_of "$nqn" | wc -l)" = 2 ] || fail "there are not two controllers"
[ "$(disk_of "$nqn")" = "$disk" ] || fail "two paths became two disks"
fio --name=paths --filename="$disk" --size=32m --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=16 \
    --verify=crc32c --verify_fatal=1 --do_verify=1 --output=/tmp/fio || { cat /tmp/fio; fail "fio on two paths"; }

say "a snapshot is a disk that nobody can write"
mkfs.ext4 -q "$disk"
mount "$disk" /mnt/e
dd if=/dev/urandom of=/mnt/e/kept bs=1M count=8 conv=fsync status=none
sum=$(md5sum </mnt/e/kept)
# What stands in the journal only could not be replayed on a disk that is not written.
fsfreeze -f /mnt/e
host snapshot disk@kept
fsfreeze -u /mnt/e
rm /mnt/e/kept
sync
kept=$(host snapshot_nqn disk@kept)
nvme discover -t tcp -a 10.0.2.2 -s "$NVME_PORT" >/tmp/discovery
grep -q "subnqn: *$kept" /tmp/discovery || { cat /tmp/discovery; fail "the snapshot is not discovered"; }
connect "$kept"
past=$(disk_of "$kept")
[ "$(cat /sys/block/"${past#/dev/}"/ro)" = 1 ] || fail "$past can be written"
mkdir -p /mnt/p
mount -o ro,noload "$past" /mnt/p
[ "$(md5sum </mnt/p/kept)" = "$sum" ] || fail "the snapshot holds something else"
[ ! -e /mnt/e/kept ] || fail "the volume was changed back"
if dd if=/dev/zero of="$past" bs=4096 count=1 oflag=direct status=none 2>/tmp/said; then fail "$past was written"; fi
# What the kernel does not stop, blockd does.
dd if=/dev/zero of=/tmp/block bs=4096 count=1 status=none
if nvme io-passthru "/dev/$(controllers_of "$kept" | head -n 1)" --opcode=1 --namespace-id=1 --cdw12=7 --data-len=4096 \
    --input-file=/tmp/block --write >/tmp/said 2>&1; then fail "blockd let $past be written"; fi
grep -qi "write protected" /tmp/said || { cat /tmp/said; fail "refused with another status"; }
umount /mnt/p /mnt/e
nvme disconnect -n "$kept" >/dev/null

say "a volume that is deleted disappears"
host create second 64MiB
second=$(host nqn second)
connect "$second"
disk_of "$second" >/dev/null
host delete second
case $(uname -r) in
    # This kernel connects again for ever, whatever it is told, and keeps the disk meanwhile.
    6.1.*) nvme disconnect -n "$second" >/dev/null ;;
    *) wait_for '[ -z "$(controllers_of '"$second"')" ]' || fail "the deleted volume's controller stays" ;;
esac
no_io_errors
nvme disconnect -n "$nqn" >/dev/null
say "done"
