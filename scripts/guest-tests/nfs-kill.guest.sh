#!/bin/bash
. /share/guest-lib.sh

export PYTHONDONTWRITEBYTECODE=1
modprobe nfsv4
# Three clients: each version is one of its own, with a cache of its own.
mkdir -p /mnt/{4.2,4.1,3}
mount -t nfs4 -o "vers=4.2,port=$NFS_PORT,proto=tcp,hard" 10.0.2.2:/ /mnt/4.2
mount -t nfs4 -o "vers=4.1,port=$NFS_PORT,proto=tcp,hard" 10.0.2.2:/ /mnt/4.1
mount -t nfs -o "vers=3,port=$NFS_PORT,mountport=$NFS_PORT,mountproto=tcp,proto=tcp,nolock,hard" 10.0.2.2:/ /mnt/3

# Held over all kills: a lock, and a file that has no name any more.
exec 7<>/mnt/4.2/held
flock -x -n 7
exec 8<>/mnt/4.2/gone
echo removed >&8
rm /mnt/4.2/gone
[ ! -e /mnt/4.1/gone ] || fail "the removed file is still there"
python3 /share/writer.py /mnt/4.2/shared.db setup 0 delete

loads=()
for version in 4.2 4.1 3; do
    mkdir "/mnt/$version/load-$version"
    python3 /share/load.py run "/mnt/$version/load-$version" "/tmp/log-$version" 1 2 /tmp/stop &
    loads+=($!)
done
# Writers of one database in two clients: its locks are all that keeps it whole.
write() {
    local count=0
    while [ ! -e /tmp/stop ]; do
        python3 /share/writer.py "/mnt/$1/shared.db" "$1-$count" 5 delete || return 1
        count=$((count + 1))
    done
    echo "$count" >"/tmp/count-$1"
}
for version in 4.2 4.1; do
    write $version &
    loads+=($!)
done
running() {
    local load
    for load in "${loads[@]}"; do kill -0 "$load" 2>/dev/null || fail "a load ended"; done
}

for round in $(seq "$ROUNDS"); do
    # Some come while clients still take back what they held.
    sleep $((RANDOM % 5)).$((RANDOM % 10))
    running
    host restart
    say "killed $round times, $(cat /tmp/log-* | wc -l) notes"
    # Waits until the others have taken back what they held, and is refused then.
    if flock -x -n /mnt/4.1/held true; then fail "the lock was lost"; fi
    [ "$(cat /proc/self/fd/8)" = removed ] || fail "the removed file that is open"
done
sleep 2
running
before=$(cat /tmp/log-* | wc -l)
sleep 3
[ "$(cat /tmp/log-* | wc -l)" -gt "$before" ] || fail "nothing goes on after the last start"
touch /tmp/stop
for load in "${loads[@]}"; do wait "$load" || fail "a load saw an error"; done
say "the loads are over; $(cat /tmp/log-* | wc -l) notes"
exec 7>&- 8>&-
flock -x -w 20 /mnt/4.1/held true || fail "the lock that was given up"

# What every client has noted, another one finds, with nothing kept from before.
umount /mnt/4.1
mount -t nfs4 -o "vers=4.1,port=$NFS_PORT,proto=tcp,hard" 10.0.2.2:/ /mnt/4.1
for version in 4.2 4.1 3; do
    python3 /share/load.py verify "/mnt/4.1/load-$version" "/tmp/log-$version" || fail "what version $version has written"
done
writers=$(($(cat /tmp/count-4.2) + $(cat /tmp/count-4.1)))
[ $writers -ge 4 ] || fail "the writers of the database wrote next to nothing"
python3 /share/writer.py /mnt/4.1/shared.db check 5 $writers
say "$writers connections to the database, 5 transactions each"
rm -rf /mnt/4.1/*
umount /mnt/4.2 /mnt/4.1 /mnt/3
if dmesg | grep -iE 'nfs.*(error|bad|unexpected)|BUG:|WARNING:'; then fail "the kernel complains"; fi
say "done"
