#!/bin/bash
. /share/guest-lib.sh
. /share/nvme-lib.sh

modprobe nvmet
modprobe nvmet-tcp
for serial in /sys/block/vd*/serial; do
    [ "$(cat "$serial")" != scratch ] || scratch=/dev/$(basename "$(dirname "$serial")")
done
mkfs.ext4 -q "$scratch"
mkdir -p /mnt/s
mount "$scratch" /mnt/s

mib=512
hot=64
blockd serve --data /mnt/s/data --nvme 127.0.0.1:4420 --nbd-tcp none --log-size 1GiB --block-cache 128MiB --dirty-memory 128MiB \
    --reactors 1 --workers 2 >/tmp/ready 2>/tmp/blockd.log &
trap 'echo "FAILED in line $LINENO: $BASH_COMMAND"; tail -n 20 /tmp/blockd.log' ERR
wait_for 'grep -q "^blockd ready" /tmp/ready' || { cat /tmp/blockd.log; fail "blockd does not start"; }
blockd volume create disk --size ${mib}MiB --admin /mnt/s/data/admin.sock >/dev/null
ours=$(blockd connect-info disk --admin /mnt/s/data/admin.sock | sed -n 's/^nvme disconnect -n //p')

# Written in full, so that writing to it allocates nothing.
for file in cached direct; do dd if=/dev/zero of=/mnt/s/$file bs=1M count=$mib oflag=direct status=none; done
mount -t configfs none /sys/kernel/config 2>/dev/null || true
port=/sys/kernel/config/nvmet/ports/1
mkdir "$port"
echo ipv4 >"$port/addr_adrfam"
echo tcp >"$port/addr_trtype"
echo 127.0.0.1 >"$port/addr_traddr"
echo 4421 >"$port/addr_trsvcid"

# Exports a file by the kernel's target: number, file, whether through the page cache.
export_file() {
    local nqn=nqn.2014-08.org.nvmexpress:uuid:33333333-3333-3333-3333-33333333333$1
    local subsystem=/sys/kernel/config/nvmet/subsystems/$nqn
    mkdir "$subsystem" "$subsystem/namespaces/1"
    echo 1 >"$subsystem/attr_allow_any_host"
    echo -n "$2" >"$subsystem/namespaces/1/device_path"
    echo "$3" >"$subsystem/namespaces/1/buffered_io"
    echo 1 >"$subsystem/namespaces/1/enable"
    ln -s "$subsystem" "$port/subsystems/$nqn"
    echo "$nqn"
}
# Reads are answered from memory on both sides. A write is answered when the kernel is at work on it, not when it is in the page
# cache, so there the file is opened for direct access.
memory=$(export_file 1 /mnt/s/cached 1)
direct=$(export_file 2 /mnt/s/direct 0)

nvme connect -t tcp -a 127.0.0.1 -s 4420 -n "$ours" --nr-io-queues=2
nvme connect -t tcp -a 127.0.0.1 -s 4421 -n "$memory" --nr-io-queues=2
nvme connect -t tcp -a 127.0.0.1 -s 4421 -n "$direct" --nr-io-queues=2
a=$(disk_of "$ours")
in_memory=$(disk_of "$memory")
on_disk=$(disk_of "$direct")
for disk in "$a" "$in_memory" "$on_disk"; do
    fio --name=fill --filename="$disk" --rw=write --bs=1m --size=${mib}m --direct=1 --ioengine=libaio --iodepth=4 --end_fsync=1 \
        --output=/tmp/fio || { cat /tmp/fio; fail fill; }
done
sleep 5

# Operations per second of a case on a disk: fio's terse output has those of reads in field 8, of writes in field 49.
measure() {
    local disk=$1 field=$2
    shift 2
    # What is read is in memory already.
    [ "$field" = 49 ] || dd if="$disk" of=/dev/null bs=1M count=$hot iflag=direct status=none
    fio --name=case --filename="$disk" --direct=1 --ioengine=libaio --time_based --runtime="$SECONDS_EACH" --ramp_time=1 \
        --randrepeat=0 --output-format=terse --terse-version=3 "$@" >/tmp/terse 2>/tmp/fio || { cat /tmp/fio; fail "fio $*"; }
    cut -d';' -f"$field" /tmp/terse | tail -n 1
}
median() { tr ' ' '\n' | grep . | sort -n | awk '{v[NR]=$1} END {print v[int((NR+1)/2)]}'; }

say "blockd over NVMe/TCP beside nvmet-tcp on a file, medians of $ROUNDS rounds of $SECONDS_EACH s"
printf '%-40s %10s %10s %6s\n' "case (operations per second)" blockd nvmet ratio
while read -r name field arguments; do
    if [ "$field" = 8 ]; then b=$in_memory; else b=$on_disk; fi
    as= bs= ratios=
    for round in $(seq "$ROUNDS"); do
        # Neither is always the first.
        # shellcheck disable=SC2086
        if [ $((round % 2)) = 1 ]; then
            x=$(measure "$a" "$field" $arguments)
            y=$(measure "$b" "$field" $arguments)
        else
            y=$(measure "$b" "$field" $arguments)
            x=$(measure "$a" "$field" $arguments)
        fi
        as="$as $x" bs="$bs $y" ratios="$ratios $(awk "BEGIN {printf \"%.2f\", $x / ($y > 0 ? $y : 1)}")"
    done
    printf '%-40s %10s %10s %6s\n' "${name//_/ }" "$(echo "$as" | median)" "$(echo "$bs" | median)" "$(echo "$ratios" | median)"
done <<CASES
4_KiB_random_read,_hot,_depth_1 8 --rw=randread --bs=4k --iodepth=1 --size=${hot}m
4_KiB_random_read,_hot,_depth_32 8 --rw=randread --bs=4k --iodepth=32 --size=${hot}m
4_KiB_random_write,_depth_1 49 --rw=randwrite --bs=4k --iodepth=1 --size=${mib}m
4_KiB_random_write,_depth_32 49 --rw=randwrite --bs=4k --iodepth=32 --size=${mib}m
4_KiB_random_write_+_flush,_depth_1 49 --rw=randwrite --bs=4k --iodepth=1 --fsync=1 --size=${mib}m
1_MiB_sequential_read,_depth_4 8 --rw=read --bs=1m --iodepth=4 --size=${hot}m
1_MiB_sequential_write,_depth_4 49 --rw=write --bs=1m --iodepth=4 --size=${mib}m
CASES
no_io_errors
nvme disconnect -n "$ours" >/dev/null
nvme disconnect -n "$memory" >/dev/null
nvme disconnect -n "$direct" >/dev/null
say "done"
