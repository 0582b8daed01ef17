#!/usr/bin/env bash
# pjdfstest over FUSE, as root. What may fail stands in pjdfstest.expected, each with its reason.
. "$(dirname "$0")/lib.sh"

pjdfstest=$(tool pjdfstest 0.2.2)
expected=$(sed -n 's/^\([a-z0-9_:]\+\) .*/    "\1",/p' "$(dirname "$0")/pjdfstest.expected")
cat >"$work/pjdfstest.toml" <<TOML
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}

[settings]
naptime = 0.01
allow_remount = true
expected_failures = [
$expected
]

[dummy_auth]
entries = [
    ["nobody", "nogroup"],
    ["daemon", "daemon"],
]
TOML

fs_make
fs_mount
mkdir "$work/second"
"$pjdfstest" -c "$work/pjdfstest.toml" -p "$mnt" -s "$work/second" "$@" >"$work/out" 2>&1 || {
    grep -v ' success$\| skipped' "$work/out" | tail -80
    exit 1
}
tail -3 "$work/out"
fs_umount
fs_check
