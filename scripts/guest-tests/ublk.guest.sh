#!/bin/bash
. /share/guest-lib.sh

# --- a daemon of the guest's own
scratch=/dev/$(basename "$(dirname "$(grep -l scratch /sys/block/vd*/serial)")")
mkfs.ext4 -q "$scratch"
mkdir /srv/local
mount "$scratch" /srv/local
export BLOCKD_DATA=/srv/local/data
serve() {
    blockd serve --log-segment 16MiB --log-size 256MiB --nbd-tcp 127.0.0.1:10809 --dirty-memory 32MiB --block-cache 32MiB \
        --destage-age 1s --reactors 1 --workers 2 >/tmp/ready 2>>/tmp/serve.log &
    daemon=$!
    until grep -qs '^blockd ready' /tmp/ready; do
        kill -0 $daemon || { tail -n 20 /tmp/serve.log; fail "the daemon in the guest does not start"; }
        sleep 0.1
    done
}
kill_daemon() {
    kill "-$1" $daemon
    wait $daemon || true
}
serve
blockd volume create disk --size 1GiB >/dev/null
blockd volume create huge --size 8TiB >/dev/null

# --- what is refused
module=$(find /lib/modules -name ublk_drv.ko)
mv "$module" /root/ublk_drv.ko
refused 'no ublk.*cannot be loaded.*modprobe ublk_drv' blockd attach --ublk disk
mv /root/ublk_drv.ko "$module"
refused 'needs root' setpriv --reuid 65534 --clear-groups blockd attach --ublk disk
refused 'no volume "nothing"' blockd attach --ublk nothing
socket=$(find "$BLOCKD_DATA" -type s -name '*nbd*' | head -n 1)
refused 'exports no volume nothing' blockd attach --ublk nothing --server "$socket"
refused 'no NBD server is at unix:/tmp/no' blockd attach --ublk disk --server /tmp/no
refused 'over its Unix socket' blockd attach --ublk disk --server 127.0.0.1:10809
refused 'is an NBD device' blockd attach --ublk disk /dev/nbd0
refused 'give --ublk' blockd attach disk /dev/ublkb0
refused 'cannot be used with' blockd attach --ublk disk --timeout 1s
refused 'is not attached' blockd detach /dev/ublkb0

# --- attach
device=$(blockd attach --ublk disk)
[ "$device" = /dev/ublkb0 ] || fail "attached as $device"
[ "$(blockdev --getsize64 "$device") $(blockdev --getss "$device")" = "$((1 << 30)) 4096" ] || fail "size"
refused 'is attached as /dev/ublkb0 already; process [0-9]+' blockd attach --ublk disk
refused 'ublkb0 is in use: volume disk is attached there' blockd attach --ublk huge /dev/ublkb0
second=$(blockd attach --ublk huge /dev/ublkb7 --block-size 512 --connections 2 --json)
[[ $second == *'"device": "/dev/ublkb7"'* ]] || fail "$second"
[ "$(blockdev --getss /dev/ublkb7)" = 512 ] || fail "block size"
start=$SECONDS
blkdiscard /dev/ublkb7
say "8 TiB discarded in $((SECONDS - start)) s"
[ $((SECONDS - start)) -le 20 ] || fail "discarding is slow"
printf x | dd of=/dev/ublkb7 bs=512 seek=9 conv=sync,fsync status=none
blkdiscard --zeroout --offset 0 --length 64KiB /dev/ublkb7
cmp -n 65536 /dev/ublkb7 /dev/zero || fail "zeroes are not written"
blockd detach huge
[ ! -e /dev/ublkb7 ] || fail "the device stays"
refused 'ublkb7 is not attached' blockd detach /dev/ublkb7

# --- a filesystem, while the daemon dies
mkfs.ext4 -q "$device"
mount "$device" /mnt
refused "in use: it is mounted on /mnt" blockd detach disk
fio --name=v --directory=/mnt --size=12M --rw=randwrite --bsrange=4k-64k --verify=crc32c --direct=1 --ioengine=libaio \
    --iodepth=8 --numjobs=4 --verify_fatal=1 --end_fsync=1 --group_reporting --output=/tmp/fio || { cat /tmp/fio; fail "fio"; }
say "fio verified"
perl /share/writer.pl write /mnt /tmp/journal /tmp/stop &
writer=$!
until [ -e /tmp/journal ] && [ "$(wc -l </tmp/journal)" -gt 10 ]; do sleep 0.2; done
for n in $(seq "$KILLS"); do
    sleep "0.$((RANDOM % 10))"
    kill_daemon KILL
    sleep "0.$((RANDOM % 10))"
    serve
    # It must get on before the next one.
    lines=$(wc -l </tmp/journal)
    for _ in $(seq 150); do
        [ "$(wc -l </tmp/journal)" -le $((lines + 4)) ] || break
        sleep 0.2
    done
    [ "$(wc -l </tmp/journal)" -gt $((lines + 4)) ] || fail "writing does not go on after kill $n"
done
say "killed $KILLS times"
# The same under reads and writes in flight at once, whose content is checked.
fio --name=w --directory=/mnt --size=12M --rw=randrw --bsrange=4k-64k --verify=crc32c --direct=1 --ioengine=libaio --iodepth=16 \
    --numjobs=2 --verify_fatal=1 --end_fsync=1 --group_reporting --output=/tmp/fio &
checker=$!
sleep 1
kill_daemon KILL
serve
wait $checker || { cat /tmp/fio; fail "fio over a restart"; }
kill_daemon TERM
serve
sleep 2
say "stopped in good order and started again"
touch /tmp/stop
wait $writer || fail "the writer failed"
umount /mnt
# From the volume, not from memory.
blockdev --flushbufs "$device"
mount "$device" /mnt
perl /share/writer.pl check /mnt /tmp/journal
umount /mnt
e2fsck -fn "$device" >/tmp/fsck 2>&1 || { cat /tmp/fsck; fail "fsck.ext4"; }
no_io_errors
tail -n 3 /run/blockd/ublkb0.log
blockd detach "$device"
[ ! -e "$device" ] || fail "the device stays"
[ "$(blockd attach --ublk disk)" = "$device" ] || fail "cannot attach again"
e2fsck -fn "$device" >/tmp/fsck 2>&1 || { cat /tmp/fsck; fail "fsck.ext4 after attaching again"; }
say "fsck clean, everything fsynced is there"

# --- by force, while the daemon is away: requests that wait fail, and nothing hangs
kill_daemon KILL
dd if=/dev/zero of="$device" bs=4k count=1 oflag=direct status=none 2>/tmp/dd &
waiting=$!
sleep 1
kill -0 $waiting || fail "a request did not wait for the daemon"
start=$SECONDS
blockd detach disk --force
! wait $waiting || fail "a request was answered without a daemon"
[ $((SECONDS - start)) -le 8 ] || fail "detaching by force took $((SECONDS - start)) s"
[ ! -e "$device" ] || fail "the device stays"
serve

# --- in the foreground, ended by a signal
blockd attach --ublk disk --foreground >/tmp/device 2>/tmp/keeper.log &
keeper=$!
until [ -s /tmp/device ]; do kill -0 $keeper; sleep 0.1; done
device=$(cat /tmp/device)
mount "$device" /mnt
kill $keeper
sleep 2
kill -0 $keeper || fail "the keeper left a mounted device"
grep -q 'is in use: it is mounted on /mnt' /tmp/keeper.log || { cat /tmp/keeper.log; fail "the keeper does not say why it stays"; }
umount /mnt
kill $keeper
wait $keeper || fail "the keeper failed: $(cat /tmp/keeper.log)"
[ ! -e "$device" ] || fail "the device stays"
kill_daemon TERM
umount /srv/local
say "detached"
