#!/bin/bash
. /share/guest-lib.sh
. /share/pjdfstest-config.sh

export GIT_CONFIG_GLOBAL=/dev/null GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@t GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@t
export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*' PYTHONDONTWRITEBYTECODE=1
modprobe nfsv4
mkdir -p /mnt/n /mnt/m /tmp/second
n=/mnt/n

# What the protocol has beside the calls that all versions have.
has_space() { [ "$version" = 4.2 ]; }
has_locks() { [ "$version" != 3 ]; }

mount_version() {
    local at=$1 version=$2 more=${3:-}
    case $version in
        3) mount -t nfs -o "vers=3,port=$NFS_PORT,mountport=$NFS_PORT,mountproto=tcp,proto=tcp,nolock,hard$more" 10.0.2.2:/ "$at" ;;
        *) mount -t nfs4 -o "vers=$version,port=$NFS_PORT,proto=tcp,sec=sys,hard$more" 10.0.2.2:/ "$at" ;;
    esac
    grep -q " $at .*vers=$version" /proc/mounts || fail "not mounted with version $version: $(grep " $at " /proc/mounts)"
}
unmount() { umount "$1" || fail "umount $1"; }
# Nothing of what the client kept is left.
mount_again() {
    unmount $n
    mount_version $n "$version"
}

run_pjdfstest() {
    local expected
    expected=$(awk -v version="$version" '!/^#/ && NF && index("," $1 ",", "," version ",") { printf "    \"%s\",\n", $2 }' /share/pjdfstest.expected)
    # shellcheck disable=SC2046
    pjdfstest_config 0.02 "$expected" $(! has_space || echo posix_fallocate) >/tmp/pjdfstest.toml
    # As over FUSE, those that remount go by themselves.
    if [ -n "$PJDFSTEST" ]; then
        pjdfstest false "$PJDFSTEST"
        return
    fi
    pjdfstest false
    pjdfstest true erofs
}
pjdfstest() {
    local remount=$1 code=0
    shift
    sed "s/REMOUNT/$remount/" /tmp/pjdfstest.toml >/tmp/now.toml
    mkdir $n/pjdfstest
    /share/pjdfstest -c /tmp/now.toml -p $n/pjdfstest -s /tmp/second "$@" >/tmp/pjdfstest.out 2>&1 || code=$?
    if [ $code != 0 ]; then
        grep -E -A12 'FAILED|panicked' /tmp/pjdfstest.out || tail -n 40 /tmp/pjdfstest.out
        fail "pjdfstest with version $version"
    fi
    say "pjdfstest $*: $(grep Summary /tmp/pjdfstest.out)"
    rm -rf $n/pjdfstest
}

run_fsx() {
    local operations=1000 seed=${FSX_SEED:-$RANDOM} flen before
    [ "$version" = 4.2 ] || operations=500
    [ -z "$LONG" ] || operations=10000
    for flen in 8192 262144 16777216; do
        {
            printf 'flen = %d\n[opsize]\nmin = 1\nmax = %d\n[weights]\n' $flen $((flen / 4 > 262144 ? 262144 : flen / 4))
            printf '%s\n' 'close_open = 1' 'invalidate = 1' 'mapread = 2' 'mapwrite = 2' 'read = 4' 'write = 4' 'truncate = 1' \
                'fsync = 0.5' 'fdatasync = 0.5' 'sendfile = 1' 'posix_fadvise = 1' 'copy_file_range = 2'
            ! has_space || printf '%s\n' 'posix_fallocate = 1' 'punch_hole = 1'
        } >/tmp/fsx.toml
        /share/fsx -N $operations -S "$seed" -f /tmp/fsx.toml -P /tmp $n/fsx >/tmp/fsx.out 2>&1 || {
            tail -n 40 /tmp/fsx.out
            fail "fsx with version $version: FSX_SEED=$seed, $operations operations, a file of $flen bytes"
        }
        before=$(sha256sum <$n/fsx)
        mount_again
        [ "$before" = "$(sha256sum <$n/fsx)" ] || fail "the file is another after a remount: FSX_SEED=$seed"
        rm $n/fsx
        say "fsx: a file of at most $flen bytes, $operations operations, seed $seed"
    done
}

run_tree() {
    git clone -q /share/bzip2.git $n/bzip2
    [ -z "$(git -C $n/bzip2 status --porcelain)" ] || fail "what git checked out is not what it expects"
    git -C $n/bzip2 fsck --full --strict 2>&1 | grep -v '^notice' || true
    say "git: cloned"
    make -s -C $n/bzip2 CFLAGS="-O0 -D_FILE_OFFSET_BITS=64" >/tmp/make.out 2>&1 || { tail /tmp/make.out; fail "make"; }
    grep -q 'in business' /tmp/make.out || { tail /tmp/make.out; fail "the project's own test"; }
    [ -z "$(make -s -n -C $n/bzip2 bzip2)" ] || fail "make would build again: times are wrong"
    say "make: built and tested"
    make -s -C $n/bzip2 clean
    git -C $n/bzip2 status --porcelain | grep -v '^??' && fail "the build changed the sources"
    echo changed >>$n/bzip2/README
    git -C $n/bzip2 commit -q -a -m changed
    git -C $n/bzip2 gc -q
    git init -q --bare -b main $n/pushed.git
    git -C $n/bzip2 push -q $n/pushed.git main
    git clone -q $n/pushed.git $n/again
    diff -r --exclude .git $n/bzip2 $n/again || fail "the pushed tree differs"
    say "git: committed, packed, pushed, cloned again"
    rm -rf $n/again $n/pushed.git $n/bzip2

    local from=/usr/include/x86_64-linux-gnu
    [ -z "$LONG" ] || from=$(echo /usr/lib/python3.[0-9]*)
    mkdir $n/tree /tmp/tree
    tar -C $from -cf - . | tar -C $n/tree -xpf -
    say "tar: unpacked"
    mount_again
    tar -C $from -cf - . | tar -C $n/tree -df - || fail "the unpacked tree differs"
    say "tar: compared"
    tar -C $n/tree -cf $n/tree.tar .
    tar -C /tmp/tree -xpf $n/tree.tar
    diff -r --no-dereference $from /tmp/tree || fail "the packed tree differs"
    say "tar: packed; $(find $n/tree | wc -l) files in and out"
    rm -rf $n/tree /tmp/tree $n/tree.tar
}

# Several writers, of one client and of two.
run_sqlite() {
    local transactions=10 mode other pids pid place
    [ -z "$LONG" ] || transactions=300
    has_locks || { say "sqlite: version 3 has no locks here"; return; }
    for mode in delete wal; do
        python3 /share/writer.py $n/$mode.db setup 0 $mode
        pids=()
        for name in first second third; do
            python3 /share/writer.py $n/$mode.db $name $transactions $mode &
            pids+=($!)
        done
        for pid in "${pids[@]}"; do wait "$pid" || fail "a writer in mode $mode"; done
        python3 /share/writer.py $n/$mode.db check $transactions 3
    done
    say "sqlite: 3 writers, $transactions transactions each, journal modes delete and wal"
    # Another minor version is another client, with a cache of its own.
    other=4.1
    [ "$version" != 4.1 ] || other=4.2
    mount_version /mnt/m $other
    python3 /share/writer.py $n/two.db setup 0 delete
    pids=()
    for place in $n /mnt/m; do
        python3 /share/writer.py $place/two.db "$place" $transactions delete &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || fail "a writer of two clients"; done
    for place in $n /mnt/m; do python3 /share/writer.py $place/two.db check $transactions 2; done
    unmount /mnt/m
    rm $n/*.db*
    say "sqlite: 2 clients, $transactions transactions each"
}

run_mmap() {
    local rounds=500 before reader
    truncate -s $((64 * 4096)) $n/mapped
    python3 /share/mapped.py $n/mapped reader $rounds &
    reader=$!
    python3 /share/mapped.py $n/mapped writer $rounds
    wait $reader || fail "a reader of a mapping"
    before=$(sha256sum <$n/mapped)
    mount_again
    [ "$before" = "$(sha256sum <$n/mapped)" ] || fail "what was written through a mapping is lost"
    # Close-to-open: who opens the file after the writer closed it sees it, in another client too.
    mount_version /mnt/m "$([ "$version" = 3 ] && echo 4.1 || echo 3)"
    [ "$before" = "$(sha256sum </mnt/m/mapped)" ] || fail "another client reads something else"
    python3 /share/mapped.py $n/mapped writer $rounds
    [ "$(sha256sum <$n/mapped)" = "$(sha256sum </mnt/m/mapped)" ] || fail "another client reads old contents"
    unmount /mnt/m
    rm $n/mapped
    say "mmap: $rounds writes seen by another process, after a remount, and by another client"
}

if [ -n "$LONG" ]; then all="4.2 4.1 3"; else all="4.2 3"; fi
for version in ${VERSIONS:-$all}; do
    say "--- version $version"
    mount_version $n $version
    for program in ${PROGRAMS:-pjdfstest fsx tree sqlite mmap}; do
        # In CI the versions share what costs most.
        if [ -z "$LONG$PROGRAMS" ] && [ "$version" != 4.2 ] && [ $program = tree ]; then continue; fi
        "run_$program"
    done
    [ -z "$(ls -A $n)" ] || fail "left behind: $(ls -A $n)"
    unmount $n
done
if dmesg | grep -iE 'nfs.*(error|bad|unexpected)|BUG:|WARNING:'; then fail "the kernel complains"; fi
say "done"
