#!/usr/bin/env bash
# The kernel's own NFS client against fsd on a bucket in a directory: versions 4.2, 4.1 and 3, and an fsd that is killed.
. "$(dirname "$0")/lib.sh"
# shellcheck disable=SC2046

[ -x "$bin/fsd" ] || die "$bin/fsd is missing; run cargo build --release --workspace"
# A function, so that whoever carries out what the guest asks for knows it too.
engine() { echo --engine log-size=256MiB --engine log-segment=16MiB --engine block-cache=64MiB --engine destage-age=1s; }

start_fsd() {
    local tries=0
    : >"$work/daemon.ready"
    "$bin/fsd" serve --data "$work/fsd" $(engine) --nfs "127.0.0.1:$(cat "$work/port")" --no-root-squash --lease 15 \
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
host_restart() {
    kill_daemon KILL
    start_fsd
}

free_port >"$work/port"
"$bin/fsd" mkfs --data "$work/fsd" $(engine) >/dev/null
start_fsd
code=0
guest --timeout "${TIMEOUT:-600}" --env NFS_PORT="$(cat "$work/port")" || code=$?
kill_daemon TERM
[ $code != 0 ] || "$bin/fsd" check --data "$work/fsd" $(engine) || code=$?
exit $code
