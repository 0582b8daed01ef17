#!/usr/bin/env bash
# Snapshots of a filesystem in a bucket, made under load: they show what was, before and after SIGKILL and deletion of others, and
# what is in them is sound. Then of one on a volume of a blockd elsewhere, which makes them itself; and none of a file.
# Usage: snapshot.sh [ROUNDS]
. "$(dirname "$0")/lib.sh"

rounds=${1:-3}
blockd=${BLOCKD:-$(dirname "$fsd")/blockd}
[ -x "$blockd" ] || { echo "no $blockd; build it first: cargo build --release --workspace" >&2; exit 1; }
tests=$(dirname "$0")
say() { "$fsd" snapshot "$@" --data "$data"; }
die() { echo "$*" >&2; exit 1; }
# Fails with these words.
refused() {
    local words=$1 said
    shift
    if said=$("$@" 2>&1); then die "done, and should not be: $*"; fi
    case $said in *"$words"*) ;; *) die "$*: \"$said\", without \"$words\"" ;; esac
}
# Everything that can be seen of a tree.
digest() {
    (cd "$1" && { find . -printf '%p %y %m %U %G %n %s %T@ %C@ %l\n'; find . -type f -exec sha256sum {} +; } | LC_ALL=C sort | sha256sum)
}
same() { [ "$(digest "$1")" = "$2" ] || die "$1 is not what it was"; }

"$fsd" mkfs --data "$data" >/dev/null
"$fsd" mount "$mnt" --daemon --data "$data" >/dev/null
mkdir "$mnt/tree"
cp -r "$root/fs-layer" "$mnt/tree/a"
declare -A was
for round in $(seq "$rounds"); do
    python3 "$tests/load.py" run "$mnt" "$work/log" "$round" 2 &
    load=$!
    sleep 1
    was[$round]=$(digest "$mnt/tree")
    # Nothing is synced before: it does that itself.
    say create "r$round" >/dev/null
    mv "$mnt/tree/a/src/disk" "$mnt/tree/disk$round"
    cp -r "$root/fs-layer/src/disk" "$mnt/tree/a/src/disk"
    find "$mnt/tree/a" -name "m*.rs" -exec sh -c 'echo changed >>"$1"' _ {} \;
    rm -r "$mnt/tree/a/tests"
    cp -r "$root/fs-layer/tests" "$mnt/tree/a/tests"
    for old in $(seq "$round"); do same "$mnt/.snapshots/r$old/tree" "${was[$old]}"; done
    # In the snapshot too all is sound, though nobody stopped for it.
    "$fsd" check --data "$work/look" --nbd "nbd+unix:///fs@r$round?socket=$data/engine/nbd.sock" >"$work/check" 2>&1 ||
        die "damage in snapshot r$round: $(cat "$work/check")"
    fs_kill
    wait $load || die "the load failed before the kill"
    "$fsd" mount "$mnt" --daemon --data "$data" >/dev/null
    for old in $(seq "$round"); do same "$mnt/.snapshots/r$old/tree" "${was[$old]}"; done
    python3 "$tests/load.py" verify "$mnt" "$work/log"
done
[ "$(ls "$mnt/.snapshots" | wc -l)" = "$rounds" ] || die "not all snapshots are listed"
[ "$(say list --json | grep -c '"name"')" = "$rounds" ] || die "fsd snapshot list does not have all"
case $(ls -A "$mnt") in *.snapshots*) die ".snapshots is listed in the root" ;; esac
refused "Read-only" touch "$mnt/.snapshots/r1/new"
refused "Read-only" rm "$mnt/.snapshots/r1/tree/a/Cargo.toml"
refused "exists" mkdir "$mnt/.snapshots"
refused "already" say create r1
refused "no snapshot none" say delete none
# Deleted while somebody reads it.
exec 9<"$mnt/.snapshots/r1/tree/a/Cargo.toml"
say delete r1 >/dev/null
refused "No such file" ls "$mnt/.snapshots/r1"
exec 9<&-
for old in $(seq 2 "$rounds"); do same "$mnt/.snapshots/r$old/tree" "${was[$old]}"; done
now=$(digest "$mnt/tree")
say create r1 >/dev/null
same "$mnt/.snapshots/r1/tree" "$now"
fs_umount
"$fsd" check --data "$data" >"$work/check" 2>&1 || die "$(cat "$work/check")"

# A blockd elsewhere.
blockd_pid=
blockd_start() {
    "$blockd" serve --data "$work/blockd" --nbd-tcp none >>"$work/blockd.log" 2>&1 &
    blockd_pid=$!
    local tries=0
    until "$blockd" volume list --data "$work/blockd" >/dev/null 2>&1; do
        sleep 0.1
        tries=$((tries + 1))
        [ $tries -lt 100 ] || { cat "$work/blockd.log" >&2; return 1; }
    done
}
trap '[ -z "$blockd_pid" ] || kill -9 "$blockd_pid" 2>/dev/null; cleanup' EXIT
blockd_start
"$blockd" volume create vol --size 1048576TiB --data "$work/blockd" >/dev/null
url="nbd+unix:///vol?socket=$work/blockd/nbd.sock"
"$fsd" mkfs --nbd "$url" --data "$data" >/dev/null
"$fsd" mount "$mnt" --nbd "$url" --data "$data" --daemon >/dev/null
cp -r "$root/fs-layer/src" "$mnt/tree"
cp -r "$root/fs-layer/tests" "$mnt/later"
now=$(digest "$mnt/tree")
later=$(digest "$mnt/later")
refused "blockd snapshot create vol@there" say create there
"$blockd" snapshot create vol@there --data "$work/blockd" >/dev/null
rm -r "$mnt/tree" "$mnt/later"
same "$mnt/.snapshots/there/tree" "$now"
kill -9 "$blockd_pid"
wait "$blockd_pid" 2>/dev/null || true
blockd_start
# What nobody has read yet, and so is kept nowhere.
same "$mnt/.snapshots/there/later" "$later"
refused "blockd snapshot delete vol@there" say delete there
# Now nobody here is connected to it, without which it could not be deleted; blockd sees that in a moment.
sleep 0.5
"$blockd" snapshot delete vol@there --data "$work/blockd" >/dev/null
sleep 2.5
refused "No such file" ls "$mnt/.snapshots/there"
fs_umount
kill "$blockd_pid"
wait "$blockd_pid" || true
blockd_pid=

fs_make
fs_mount
refused "No such file" ls "$mnt/.snapshots"
refused "cannot have snapshots" say create none
fs_umount
echo "$rounds snapshots looked at again and again, fsd killed $rounds times, blockd once"
