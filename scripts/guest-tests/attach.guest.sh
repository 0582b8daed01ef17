#!/bin/bash
. /share/guest-lib.sh

# --- what is refused
module=$(find /lib/modules -name nbd.ko)
mv "$module" /root/nbd.ko
refused 'no NBD client.*cannot be loaded.*Use a kernel' blockd attach disk --server "$SERVER"
mv /root/nbd.ko "$module"
refused 'needs root' setpriv --reuid 65534 --clear-groups blockd attach disk --server "$SERVER"
refused 'exports no volume nothing' blockd attach nothing --server "$SERVER"
refused 'no NBD server answers' blockd attach disk --server 10.0.2.2:1
refused 'no NBD server is at unix:/tmp/no' blockd attach disk --server /tmp/no
refused 'no blockd answers' blockd attach disk
refused 'is not attached' blockd detach disk

# --- attach
device=$(blockd attach disk --server "$SERVER")
[ "$device" = /dev/nbd0 ] || fail "attached as $device"
[ "$(blockdev --getsize64 "$device") $(blockdev --getss "$device")" = "$((4 << 30)) 4096" ] || fail "size"
[ "$(host clients)" = 4 ] || fail "$(host clients) connections"
refused 'is attached as /dev/nbd0 already; process [0-9]+' blockd attach disk --server "$SERVER"
refused 'nbd0 is in use: volume disk is attached there' blockd attach huge /dev/nbd0 --server "$SERVER"
second=$(blockd attach huge /dev/nbd20 --server "$SERVER" --block-size 512 --connections 2 --json)
[[ $second == *'"device": "/dev/nbd20"'* ]] || fail "$second"
[ "$(blockdev --getss /dev/nbd20)" = 512 ] || fail "block size"
say "attached"
start=$SECONDS
blkdiscard /dev/nbd20
say "8 TiB discarded in $((SECONDS - start)) s"
[ $((SECONDS - start)) -le 10 ] || fail "discarding is slow"
blockd detach huge
refused 'nbd20 is not attached' blockd detach /dev/nbd20

# --- filesystems
round() {
    local fs=$1 start=$SECONDS before after
    mkfs.$fs "${@:2}" -q "$device"
    say "mkfs.$fs took $((SECONDS - start)) s"
    [ $((SECONDS - start)) -le 60 ] || fail "mkfs.$fs is slow"
    mount "$device" /mnt
    refused "in use: it is mounted on /mnt" blockd detach disk
    tar -C /mnt -xf /share/tree.tar
    say "untarred"
    fio --name=v --directory=/mnt --size=12M --rw=randwrite --bsrange=4k-64k --verify=crc32c --direct=1 --ioengine=libaio \
        --iodepth=8 --numjobs=4 --verify_fatal=1 --end_fsync=1 --group_reporting --output=/tmp/fio || { cat /tmp/fio; fail "fio"; }
    say "fio verified"
    sync
    host drain
    before=$(host live)
    rm /mnt/v.*
    sync
    fstrim /mnt
    host drain
    after=$(host live)
    [ "$((before - after))" -gt 0 ] || fail "fstrim freed nothing: $before, then $after"
    say "fstrim: live went from $before to $after"
    umount /mnt
    # From the volume, not from memory.
    blockdev --flushbufs "$device"
    mount "$device" /mnt
    tar -C /mnt -df /share/tree.tar || fail "the tree differs"
    umount /mnt
}
round ext4 -E lazy_itable_init=0
e2fsck -fn "$device" || fail "fsck.ext4"
round xfs -f
xfs_repair -n "$device" >/tmp/repair 2>&1 || { cat /tmp/repair; fail "xfs_repair"; }
round btrfs -f
btrfs check --readonly "$device" >/tmp/check 2>&1 || { cat /tmp/check; fail "btrfs check"; }

# --- growing
mkfs.ext4 -q -F "$device"
mount "$device" /mnt
before=$(df --output=size -k /mnt | tail -n 1)
host grow
for _ in $(seq 60); do
    [ "$(blockdev --getsize64 "$device")" != $((6 << 30)) ] || break
    sleep 0.25
done
[ "$(blockdev --getsize64 "$device")" = $((6 << 30)) ] || fail "the device does not grow"
resize2fs "$device" >/tmp/resize 2>&1 || { cat /tmp/resize; fail "resize2fs"; }
after=$(df --output=size -k /mnt | tail -n 1)
[ "$after" -gt $((before + 1900000)) ] || fail "resize2fs: $before, then $after KiB"
say "grown online from $before to $after KiB"
umount /mnt
e2fsck -fn "$device" || fail "fsck.ext4 after growing"
no_io_errors

# --- the keeper may die and be replaced; a device goes only when it is not in use, or by force
pid=$(cat /run/blockd/nbd0.pid)
kill -9 "$pid"
[ "$(blockd attach disk --server "$SERVER")" = "$device" ] || fail "not adopted"
[ "$(cat /run/blockd/nbd0.pid)" != "$pid" ] || fail "no new keeper"
mount "$device" /mnt
blockd detach disk --force
sleep 0.5
[ ! -e /sys/block/nbd0/pid ] || say "the device is gone when it is unmounted"
umount -l /mnt
for _ in $(seq 50); do
    [ -e /sys/block/nbd0/pid ] || break
    sleep 0.1
done
[ ! -e /sys/block/nbd0/pid ] || fail "the device stays"
[ "$(blockd attach disk --server "$SERVER")" = "$device" ] || fail "cannot attach again"
blockd detach "$device"
[ "$(host clients)" = 0 ] || { sleep 1; [ "$(host clients)" = 0 ]; } || fail "connections are left"
say "detached"

# --- a device is not given what is no longer its volume
device=$(blockd attach swap --server "$SERVER" --timeout 2s)
told() {
    local log=/run/blockd/${device#/dev/}.log
    for _ in $(seq 150); do
        ! grep "$1" "$log" || return 0
        sleep 0.2
    done
    cat "$log"
    fail "the keeper does not say: $1"
}
host shrink
told 'the volume has shrunk'
host swap
told 'there is another volume of this name now'
blockd detach swap --force

# --- a daemon on the same machine: its address is known, and its end is none for the device
scratch=$(grep -l scratch /sys/block/vd*/serial)
mkfs.ext4 -q "/dev/$(basename "$(dirname "$scratch")")"
mkdir /srv/local
mount "/dev/$(basename "$(dirname "$scratch")")" /srv/local
export BLOCKD_DATA=/srv/local/data
serve() {
    blockd serve --log-segment 16MiB --log-size 128MiB --nbd-tcp none --dirty-memory 16MiB --block-cache 16MiB >/tmp/ready 2>/tmp/serve.log &
    daemon=$!
    until grep -q '^blockd ready' /tmp/ready; do
        kill -0 $daemon || { cat /tmp/serve.log; fail "the daemon in the guest does not start"; }
        sleep 0.1
    done
}
serve
refused 'no volume "local"' blockd attach local
blockd volume create local --size 256MiB >/dev/null
blockd attach local --foreground --timeout 1s >/tmp/device 2>/tmp/keeper.log &
keeper=$!
until [ -s /tmp/device ]; do kill -0 $keeper; sleep 0.1; done
device=$(cat /tmp/device)
mkfs.ext4 -q "$device"
mount "$device" /mnt
kill $keeper
sleep 1
kill -0 $keeper || fail "the keeper left a mounted device"
grep -q 'is in use: it is mounted on /mnt' /tmp/keeper.log || { cat /tmp/keeper.log; fail "the keeper does not say why it stays"; }
echo before >/mnt/file
kill -9 $daemon
wait $daemon || true
echo after >>/mnt/file
serve
sync -f /mnt
[ "$(cat /mnt/file)" = "before
after" ] || fail "the file differs"
umount /mnt
kill $keeper
wait $keeper || fail "the keeper failed: $(cat /tmp/keeper.log)"
[ ! -e "/sys/block/${device#/dev/}/pid" ] || fail "the device stays"
kill $daemon
wait $daemon || fail "the daemon failed"
umount /srv/local
say "a daemon in the guest: attached over its socket"
