#!/usr/bin/env bash
# The kernel's own NFS client against a tree in memory: versions 4.2 and 4.1, and a server that restarts.
. "$(dirname "$0")/lib.sh"

server=$bin/examples/memory_nfs
[ -x "$server" ] || die "$server is missing; run cargo build --release -p fs-layer --example memory_nfs"

# The server reads lines from here: each is a restart, the end of them all is its end.
mkfifo "$work/commands"
exec 9<>"$work/commands"
ready() { grep -c '^ready' "$work/server.out" || true; }
wait_ready() {
    local tries=0
    until [ "$(ready)" -gt "$1" ]; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] || die "the server does not get ready"
        sleep 0.05
    done
}
host_restart() {
    local before
    before=$(ready)
    echo restart >"$work/commands"
    wait_ready "$before"
}
stop_server() { kill "$server_pid" 2>/dev/null; }

: >"$work/server.out"
RUST_LOG=${RUST_LOG:-info} "$server" 127.0.0.1:0 "$work/state" 15 <"$work/commands" >"$work/server.out" 2>"$work/server.log" 9<&- &
server_pid=$!
cleanups+=(stop_server)
wait_ready 0
sed -n 's/^ready .*://p' "$work/server.out" >"$work/port"

# No blockd is needed.
mkdir -p "$work/share"
: >"$work/share/blockd"
cp "$here/guest-lib.sh" "$work/share/"
code=0
guest --timeout "${TIMEOUT:-600}" --env NFS_PORT="$(cat "$work/port")" || code=$?
if [ $code != 0 ]; then
    echo "--- what the server said at last:" >&2
    tail -n 20 "$work/server.log" >&2
fi
exit $code
