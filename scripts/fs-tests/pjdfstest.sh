#!/usr/bin/env bash
# pjdfstest over FUSE, as root. What may fail stands in pjdfstest.expected, each with its reason.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/pjdfstest-config.sh"

pjdfstest=$(tool pjdfstest 0.2.2)
expected=$(sed -n 's/^\([a-z0-9_:]\+\) .*/    "\1",/p' "$(dirname "$0")/pjdfstest.expected")
pjdfstest_config 0.01 "$expected" posix_fallocate >"$work/pjdfstest.toml"

fs_make
fs_mount
mkdir "$work/second"
# Tests on a read-only remount go by themselves: others leave files open for writing until the whole program ends, and such a
# filesystem cannot be remounted.
run() {
    sed "s/REMOUNT/$1/" "$work/pjdfstest.toml" >"$work/now.toml"
    "$pjdfstest" -c "$work/now.toml" -p "$mnt" -s "$work/second" "${@:2}" >"$work/out" 2>&1 || {
        grep -A3 FAILED "$work/out" || tail -20 "$work/out"
        exit 1
    }
    grep Summary "$work/out"
}
run false "$@"
run true erofs
fs_umount
fs_check
