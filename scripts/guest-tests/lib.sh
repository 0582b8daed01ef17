# What the tests with a guest share; sourced by the part of a test that runs on the host.
#
# A test NAME.sh runs on the host, and has the guest run NAME.guest.sh. `start_daemon` and `guest` do what their names say;
# the guest can call the functions named host_* through `host NAME ARGUMENT...`, see guest-lib.sh.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
export PATH="$HOME/.cargo/bin:$PATH:/usr/sbin:/sbin"
bin=${CARGO_TARGET_DIR:-$root/target}/${BUILD_PROFILE:-release}
blockd=$bin/blockd
test_name=$(basename "$0" .sh)
long=${LONG:-}

die() { echo "$test_name: $*" >&2; exit 1; }

mkdir -p "$root/target"
# The log wants O_DIRECT, which /tmp may not have; a Unix socket wants a short path.
work=$(mktemp -d "$root/target/guest-$test_name-XXXXXX")
sockets=$(mktemp -d /tmp/guest-XXXXXX)
cleanups=()
children=()
cleanup() {
    local status=$? command child
    for command in ${cleanups[@]+"${cleanups[@]}"}; do $command || true; done
    for child in ${children[@]+"${children[@]}"}; do kill "$child" 2>/dev/null || true; done
    [ ! -s "$work/daemon.pid" ] || kill -9 "$(cat "$work/daemon.pid")" 2>/dev/null || true
    if [ $status != 0 ] && [ -e "$work/daemon.log" ]; then
        echo "--- what the daemon said at last:" >&2
        tail -n 20 "$work/daemon.log" >&2
    fi
    rm -rf "$work" "$sockets"
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

# Starts, or starts again with the same address, a daemon with small limits and the arguments given first.
start_daemon() {
    [ $# = 0 ] || printf '%s\n' "$@" >"$work/daemon.args"
    [ -e "$work/daemon.args" ] || : >"$work/daemon.args"
    local port=0 more=() tries=0
    [ ! -e "$work/port" ] || port=$(cat "$work/port")
    mapfile -t more <"$work/daemon.args"
    : >"$work/daemon.ready"
    [[ " ${more[*]-} " == *" --block-cache "* ]] || more+=(--block-cache 64MiB)
    "$blockd" serve --data "$work/data" --admin "$sockets/admin" --nbd-unix "$sockets/nbd" --nbd-tcp "127.0.0.1:$port" \
        --log-segment 16MiB --dirty-memory 64MiB --destage-age 1s --reactors 1 --workers 2 \
        ${more[@]+"${more[@]}"} >"$work/daemon.ready" 2>>"$work/daemon.log" </dev/null &
    echo $! >"$work/daemon.pid"
    disown
    until grep -q '^blockd ready' "$work/daemon.ready"; do
        kill -0 "$(cat "$work/daemon.pid")" 2>/dev/null || die "the daemon does not start"
        tries=$((tries + 1))
        [ $tries -lt 1200 ] || die "the daemon does not get ready"
        sleep 0.05
    done
    [ -e "$work/port" ] || status | jq -r '.daemon.nbd_tcp[0]' | sed 's/.*://' >"$work/port"
}
# A TCP port of the loopback interface that was free a moment ago.
free_port() { perl -MIO::Socket::INET -e 'print IO::Socket::INET->new(LocalAddr => "127.0.0.1", Listen => 1)->sockport'; }
kill_daemon() {
    local pid
    pid=$(cat "$work/daemon.pid")
    kill "-${1:-KILL}" "$pid"
    # It is not our child any more when the control process restarted it.
    while kill -0 "$pid" 2>/dev/null; do sleep 0.02; done
}
ctl() { "$blockd" "$@" --admin "$sockets/admin"; }
status() { ctl status --json; }
# A counter of a volume: stat VOLUME NAME.
stat_of() { status | jq ".volumes[] | select(.name == \"$1\").stats.$2"; }
wait_drained() {
    local tries=0
    until [ "$(status | jq '[.volumes[].stats.dirty_bytes // 0] | add')" = 0 ]; do
        tries=$((tries + 1))
        [ $tries -lt 1200 ] || die "the volumes do not drain"
        sleep 0.1
    done
}

# Runs NAME.guest.sh in the guest; further arguments go to scripts/guest. The binary (unless `without_blockd` is set) and the tests are
# in /share.
guest() {
    mkdir -p "$work/share"
    if [ ! -e "$work/share/guest-lib.sh" ]; then
        [ -n "${without_blockd:-}" ] || strip -o "$work/share/blockd" "$blockd"
        cp "$here"/writer.pl "$here"/guest-lib.sh "$here"/nvme-lib.sh "$work/share/"
    fi
    local handler=$work/handler control=
    {
        echo '#!/bin/bash'
        echo "set -euo pipefail"
        declare -p here root bin blockd test_name long work sockets
        declare -f
        echo 'host_"$@"'
    } >"$handler"
    chmod +x "$handler"
    rm -f "$work/control"
    perl "$here/control" "$work/control" "$handler" &
    control=$!
    children+=($control)
    until [ -s "$work/control" ]; do sleep 0.05; done
    "$root/scripts/guest" "$here/$test_name.guest.sh" --share "$work/share" --console "$work/console" \
        --env CONTROL="$(cat "$work/control")" --env SERVER="10.0.2.2:$(cat "$work/port")" --env LONG="$long" "$@" &
    local qemu=$! code=0
    children+=($qemu)
    wait $qemu || code=$?
    kill $control 2>/dev/null || true
    return $code
}
