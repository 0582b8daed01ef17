#!/bin/bash
. /share/guest-lib.sh

device=$(blockd attach disk --server "$RECORDER")
case $FS in
    ext4) mkfs.ext4 -q "$device" ;;
    *) mkfs.$FS -q -f "$device" >/dev/null ;;
esac
mount "$device" /mnt
# The filesystem itself is there from here on.
sync -f /mnt
exec 4<>"/dev/tcp/${MARKS%:*}/${MARKS#*:}"
echo mounted >&4
read -r answer <&4
[ "$answer" = ok ] || fail "the recorder says $answer"
perl /share/writer.pl write /mnt /tmp/journal /tmp/stop "$MARKS" &
writer=$!
sleep "$SECONDS_OF_LOAD"
touch /tmp/stop
wait $writer || fail "the writer failed"
umount /mnt
no_io_errors
blockd detach disk
