# Shared by the tests of fsd: a filesystem on a sparse file, mounted over FUSE in a directory of its own.
# Each test runs as root, sources this, and leaves nothing behind.
# shellcheck shell=bash

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
fsd=${FSD:-${CARGO_TARGET_DIR:-$root/target}/${BUILD_PROFILE:-release}/fsd}
[ -x "$fsd" ] || { echo "no $fsd; build it first: cargo build --release --workspace" >&2; exit 1; }
[ -e /dev/fuse ] || { echo "no /dev/fuse: these tests need FUSE" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "these tests mount and switch users: run them as root" >&2; exit 1; }

# Where the disk is; on a real disk, so that a flush is one.
work=$(mktemp -d "${FS_TESTS_DIR:-${TMPDIR:-/tmp}}/fsd-test.XXXXXX")
chmod 755 "$work"
mnt=$work/mnt
disk=$work/disk
data=$work/data
mkdir -p "$mnt" "$data"

fs_make() { "$fsd" mkfs --data "$data" --disk "$disk" --size 1TiB "$@" >/dev/null; }

# The process of the mounted fsd.
fs_pid() { sed -n 's/.*"pid": *\([0-9]*\).*/\1/p' <("$fsd" status --data "$data" --json); }

fs_mount() { "$fsd" mount "$mnt" --daemon --data "$data" --disk "$disk" "$@" >/dev/null; }

# Unmounts, and waits until the process has written everything and is gone.
fs_umount() {
    local pid
    pid=$(fs_pid)
    umount "$mnt"
    fs_wait_gone "$pid"
}

fs_wait_gone() {
    local tries=0
    while kill -0 "$1" 2>/dev/null; do
        sleep 0.05
        tries=$((tries + 1))
        [ $tries -lt 1200 ] || { echo "fsd does not end a minute after it was unmounted" >&2; return 1; }
    done
}

fs_kill() {
    local pid
    pid=$(fs_pid)
    kill -9 "$pid"
    fs_wait_gone "$pid"
    umount -l "$mnt" 2>/dev/null || true
}

# FS_TESTS_NO_CHECK leaves it out.
fs_check() {
    [ -z "${FS_TESTS_NO_CHECK:-}" ] || return 0
    "$fsd" check --data "$data" --disk "$disk" >"$work/check" 2>&1 || {
        echo "fsd check finds damage:" >&2
        cat "$work/check" >&2
        return 1
    }
}

cleanup() {
    local code=$? pid
    trap - EXIT
    if mountpoint -q "$mnt" 2>/dev/null || ! stat "$mnt" >/dev/null 2>&1; then
        pid=$(fs_pid 2>/dev/null) || pid=
        umount "$mnt" 2>/dev/null || umount -l "$mnt" 2>/dev/null || true
        [ -z "$pid" ] || fs_wait_gone "$pid" || kill -9 "$pid" 2>/dev/null || true
    fi
    if [ $code -ne 0 ] && [ -s "$data/fsd.log" ]; then
        echo "the last of fsd's log:" >&2
        tail -20 "$data/fsd.log" >&2
    fi
    rm -rf "$work"
    exit $code
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# A tool from crates.io of a given version, built once into a directory that CI may keep.
tool() { "$root/scripts/fs-tests/tool" "$@"; }
