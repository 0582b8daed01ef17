#!/bin/bash
. /share/guest-lib.sh

modprobe nfsv4
mkdir -p /mnt/n /mnt/m
# A request that hangs must not hang the test: the message says where.
options() { echo "vers=$1,port=$NFS_PORT,proto=tcp,sec=sys,hard,actimeo=${2:-3}"; }
unmount() { umount "$1" || fail "umount $1"; }

say "mount with version 4.2"
mount -t nfs4 -o "$(options 4.2)" 10.0.2.2:/ /mnt/n
grep -q 'vers=4.2' /proc/mounts || fail "$(grep nfs4 /proc/mounts)"
[ "$(stat -f -c %T /mnt/n)" = nfs ] || fail "statfs"
df /mnt/n | tail -n 1

say "files, directories, links"
cd /mnt/n
mkdir d
echo hello >d/file
[ "$(cat d/file)" = hello ] || fail "contents"
echo more >>d/file
[ "$(wc -c <d/file)" = 11 ] || fail "appending"
mv d/file d/other
[ ! -e d/file ] && [ -e d/other ] || fail "rename"
ln d/other d/link
[ "$(stat -c %h d/other)" = 2 ] || fail "links"
ln -s other d/symlink
[ "$(readlink d/symlink)" = other ] && [ "$(head -n 1 d/symlink)" = hello ] || fail "symlink"
mkfifo d/fifo
mknod d/null c 1 3
[ "$(stat -c %t:%T d/null)" = 1:3 ] || fail "device"
chmod 2751 d/other
chown 1234:567 d/other
[ "$(stat -c %a:%u:%g d/other)" = 751:1234:567 ] || fail "attributes: $(stat -c %a:%u:%g d/other)"
touch -d '2001-02-03 04:05:06.789012345' d/other
[ "$(stat -c %y d/other | cut -c 1-29)" = "2001-02-03 04:05:06.789012345" ] || fail "times"
if (set -o noclobber; echo x >d/other) 2>/dev/null; then fail "O_EXCL"; fi
(set -o noclobber; echo x >d/exclusive) || fail "O_EXCL of a new file"
[ "$(stat -c %a d/exclusive)" = 644 ] || fail "mode of an exclusive create: $(stat -c %a d/exclusive)"
truncate -s 3 d/other
[ "$(cat d/other)" = hel ] || fail "truncate"
if rmdir d 2>/dev/null; then fail "rmdir of a full directory"; fi
name=$(printf 'n%.0s' $(seq 255))
echo x >"d/$name"
if touch "d/n$name" 2>/dev/null; then fail "a name of 256 bytes"; fi
rm -r d
[ -z "$(ls -A)" ] || fail "rm -r: $(ls -A)"

say "removed files that are open, without another name"
exec 5<>/mnt/n/unlinked
echo kept >&5
rm /mnt/n/unlinked
[ -z "$(ls -A /mnt/n)" ] || fail "a silly rename: $(ls -A /mnt/n)"
[ "$(cat /proc/self/fd/5)" = kept ] || fail "reading a removed file"
exec 5>&-

say "permissions of another user"
mkdir -m 0700 /mnt/n/private
mkdir -m 0777 /mnt/n/public
if setpriv --reuid 1000 --regid 1000 --clear-groups touch /mnt/n/private/x 2>/dev/null; then fail "a private directory"; fi
setpriv --reuid 1000 --regid 1000 --clear-groups touch /mnt/n/public/x || fail "a public directory"
[ "$(stat -c %u /mnt/n/public/x)" = 1000 ] || fail "the owner"
rm -r /mnt/n/private /mnt/n/public

say "thousands of entries"
mkdir /mnt/n/many
seq -f '/mnt/n/many/entry-%g' 2000 | xargs touch
echo 3 >/proc/sys/vm/drop_caches
[ "$(ls -f /mnt/n/many | grep -c entry)" = 2000 ] || fail "readdir found $(ls -f /mnt/n/many | grep -c entry)"
[ "$(find /mnt/n/many -type f | sort | uniq | wc -l)" = 2000 ] || fail "find"
rm -r /mnt/n/many

say "large contents"
dd if=/dev/urandom of=/tmp/random bs=1M count=16 status=none
cp /tmp/random /mnt/n/random
sync
echo 3 >/proc/sys/vm/drop_caches
cmp /tmp/random /mnt/n/random || fail "contents"
dd if=/dev/urandom of=/tmp/random bs=4k seek=7 count=3 conv=notrunc status=none
dd if=/tmp/random of=/mnt/n/random bs=4k skip=7 seek=7 count=3 conv=notrunc,fsync oflag=direct status=none
echo 3 >/proc/sys/vm/drop_caches
cmp /tmp/random /mnt/n/random || fail "contents after O_DIRECT"

say "holes, space, copies"
cp --reflink=always /mnt/n/random /mnt/n/clone || fail "reflink"
cmp /tmp/random /mnt/n/clone || fail "contents of the clone"
cp --reflink=never /mnt/n/random /mnt/n/copy
cmp /tmp/random /mnt/n/copy || fail "contents of the copy"
truncate -s 64M /mnt/n/sparse
echo middle | dd of=/mnt/n/sparse bs=1M seek=32 conv=notrunc status=none
sync
[ "$(du -k /mnt/n/sparse | cut -f 1)" -lt 1024 ] || fail "the sparse file takes $(du -k /mnt/n/sparse)"
cp --sparse=auto /mnt/n/sparse /mnt/n/sparse2
cmp /mnt/n/sparse /mnt/n/sparse2 || fail "contents of the sparse copy"
[ "$(du -k /mnt/n/sparse2 | cut -f 1)" -lt 1024 ] || fail "the sparse copy takes $(du -k /mnt/n/sparse2)"
fallocate -l 1M /mnt/n/space
[ "$(stat -c %s:%b /mnt/n/space)" = 1048576:2048 ] || fail "fallocate: $(stat -c %s:%b /mnt/n/space)"
fallocate -p -o 4096 -l 8192 /mnt/n/space
[ "$(stat -c %s:%b /mnt/n/space)" = 1048576:2032 ] || fail "punch: $(stat -c %s:%b /mnt/n/space)"
rm /mnt/n/sparse* /mnt/n/clone /mnt/n/copy /mnt/n/space

say "extended attributes"
perl -e '
    use strict;
    my ($set, $get, $list, $remove) = (188, 191, 194, 197);
    my ($path, $name, $value) = ("/mnt/n/random", "user.colour", "green");
    syscall($set, $path, $name, $value, length $value, 0) == 0 or die "setxattr: $!";
    my $buffer = "\0" x 100;
    my $got = syscall($get, $path, $name, $buffer, 100);
    substr($buffer, 0, $got) eq $value or die "getxattr: $got $!";
    $got = syscall($list, $path, $buffer, 100);
    substr($buffer, 0, $got) eq "$name\0" or die "listxattr: $got $!";
    syscall($set, $path, $name, $value, length $value, 1) == -1 or die "XATTR_CREATE over an existing one";
    syscall($remove, $path, $name) == 0 or die "removexattr: $!";
    syscall($get, $path, $name, $buffer, 100) == -1 or die "it is still there";
' || fail "xattrs"

say "locks between two clients"
# A mount of its own, as another client.
mount -t nfs4 -o "$(options 4.1),nosharecache" 10.0.2.2:/ /mnt/m
flock -n /mnt/n/random true || fail "flock"
(flock -s 6; sleep 3) 6</mnt/n/random &
sleep 1
flock -s -n /mnt/m/random true || fail "two shared locks"
if flock -x -n /mnt/m/random true; then fail "an exclusive lock beside a shared one"; fi
before=$SECONDS
flock -x -w 30 /mnt/m/random true || fail "a lock that became free"
say "waited $((SECONDS - before)) s"
unmount /mnt/m

say "tar of a tree"
mkdir /mnt/n/tree
tar -C /usr/share -cf /tmp/tree.tar perl5 doc 2>/dev/null || tar -C /etc -cf /tmp/tree.tar .
tar -C /mnt/n/tree -xf /tmp/tree.tar
echo 3 >/proc/sys/vm/drop_caches
tar -C /mnt/n/tree -df /tmp/tree.tar || fail "the tree differs"
say "$(find /mnt/n/tree | wc -l) files"
rm -r /mnt/n/tree

say "the server restarts while files are open and locked"
exec 7<>/mnt/n/held
echo before >&7
exec 8<>/mnt/n/gone
echo removed >&8
rm /mnt/n/gone
flock -x -n 7
dd if=/tmp/random of=/mnt/n/writing bs=64k status=none &
host restart
wait $! || fail "writing over a restart"
echo after >&7
[ "$(cat /mnt/n/held)" = "before
after" ] || fail "contents of a file that was held: $(cat /mnt/n/held)"
cmp /tmp/random /mnt/n/writing || fail "contents written over a restart"
mount -t nfs4 -o "$(options 4.2),nosharecache" 10.0.2.2:/ /mnt/m
if flock -x -n /mnt/m/held true; then fail "the lock was lost"; fi
[ "$(cat /proc/self/fd/8)" = removed ] || fail "a removed file that was open over the restart"
exec 7>&- 8>&-
unmount /mnt/m

say "connections that break"
modprobe tcp_diag
rm -f /mnt/n/writing
dd if=/tmp/random of=/mnt/n/writing bs=64k oflag=direct status=none &
broken=0
for i in $(seq 10); do
    sleep 0.1
    [ -z "$(ss -H -K dst 10.0.2.2 dport = ":$NFS_PORT")" ] || broken=$((broken + 1))
    mkdir "/mnt/n/made-$i" || fail "mkdir over a broken connection"
    rmdir "/mnt/n/made-$i" || fail "rmdir over a broken connection"
done
wait $! || fail "writing over broken connections"
cmp /tmp/random /mnt/n/writing || fail "contents written over broken connections"
[ $broken -ge 3 ] || fail "$broken connections were broken"
say "$broken were broken"

say "version 4.1, without caching"
cd /
unmount /mnt/n
mount -t nfs4 -o "$(options 4.1 0)" 10.0.2.2:/ /mnt/n
for i in $(seq 50); do echo $i >/mnt/n/t-$i; mv /mnt/n/t-$i /mnt/n/u-$i; done
[ "$(cat /mnt/n/u-* | wc -l)" = 50 ] || fail "small files"
rm /mnt/n/*
unmount /mnt/n

say "version 3"
mount -t nfs -o "vers=3,port=$NFS_PORT,mountport=$NFS_PORT,mountproto=tcp,proto=tcp,nolock" 10.0.2.2:/ /mnt/n
df /mnt/n | tail -n 1
mkdir /mnt/n/dir
[ "$(ls -a /mnt/n/dir | tr '\n' ' ')" = ". .. " ] || fail "an empty directory: $(ls -a /mnt/n/dir)"
cp /tmp/random /mnt/n/dir/random
(set -o noclobber; echo x >/mnt/n/dir/exclusive) || fail "O_EXCL"
ln /mnt/n/dir/random /mnt/n/dir/link
ln -s random /mnt/n/dir/symlink
mknod /mnt/n/dir/null c 1 3
mkfifo /mnt/n/dir/fifo
chown 1000:1000 /mnt/n/dir/random
chmod 0600 /mnt/n/dir/random
echo 3 >/proc/sys/vm/drop_caches
cmp /tmp/random /mnt/n/dir/symlink || fail "contents"
[ "$(stat -c %a:%u:%h /mnt/n/dir/link)" = 600:1000:2 ] || fail "attributes"
setpriv --reuid 1000 --regid 1000 --clear-groups cat /mnt/n/dir/random >/dev/null || fail "the owner may not read"
if setpriv --reuid 1001 --regid 1000 --clear-groups cat /mnt/n/dir/random >/dev/null 2>&1; then fail "another may read"; fi
mkdir /mnt/n/many
seq -f '/mnt/n/many/entry-%g' 1000 | xargs touch
[ "$(find /mnt/n/many -type f | sort | uniq | wc -l)" = 1000 ] || fail "find"
mkdir /mnt/n/tree
tar -C /mnt/n/tree -xf /tmp/tree.tar
echo 3 >/proc/sys/vm/drop_caches
tar -C /mnt/n/tree -df /tmp/tree.tar || fail "the tree differs"
host restart
mv /mnt/n/dir /mnt/n/moved
rm -r /mnt/n/*
unmount /mnt/n

if dmesg | grep -iE 'nfs.*(error|bad|unexpected)|BUG:|WARNING:'; then fail "the kernel complains"; fi
say "done"
