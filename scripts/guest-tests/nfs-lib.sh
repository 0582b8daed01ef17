# What the tests of fsd over NFS share; sourced after lib.sh by the part on the host.
# shellcheck shell=bash disable=SC2046,SC2154

without_blockd=1
[ -x "$bin/fsd" ] || die "$bin/fsd is missing; run cargo build --release --workspace"

mkfs_options=(--size 1TiB)
# Where the filesystem is. A function, so that whoever carries out what the guest asks for knows it too.
fsd_place() { echo --data "$work/fsd" --disk "$work/disk"; }

start_fsd() {
    local tries=0
    : >"$work/daemon.ready"
    "$bin/fsd" serve $(fsd_place) --nfs "127.0.0.1:$(cat "$work/port")" --no-root-squash --lease "${LEASE:-15}" \
        >"$work/daemon.ready" 2>>"$work/daemon.log" </dev/null 9<&- &
    echo $! >"$work/daemon.pid"
    disown
    until [ -s "$work/daemon.ready" ]; do
        kill -0 "$(cat "$work/daemon.pid")" 2>/dev/null || die "fsd does not start"
        tries=$((tries + 1))
        [ $tries -lt 1200 ] || die "fsd does not get ready"
        sleep 0.05
    done
}

# Kills fsd with SIGKILL, and starts it again.
host_restart() {
    kill_daemon KILL
    start_fsd
}

# Makes the filesystem, runs the guest's part with these options, and checks the filesystem afterwards.
fsd_test() {
    local code=0
    free_port >"$work/port"
    "$bin/fsd" mkfs $(fsd_place) "${mkfs_options[@]}" >/dev/null
    start_fsd
    guest --env NFS_PORT="$(cat "$work/port")" "$@" || code=$?
    kill_daemon TERM
    [ $code != 0 ] || "$bin/fsd" check $(fsd_place) || code=$?
    return $code
}
