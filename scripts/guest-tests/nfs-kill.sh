#!/usr/bin/env bash
# fsd is killed with SIGKILL, again and again, while three NFS clients make, replace, rename, remove and lock files. None sees an error, what
# was synced is there, locks stay whose they were, and fsd check finds nothing. ROUNDS: how many kills.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/nfs-lib.sh"

mkdir -p "$work/share"
cp "$root"/scripts/fs-tests/{load.py,writer.py} "$work/share/"
# A client tries to connect again after 3 seconds, then after twice as long, and so on: it must not come too late.
export LEASE=60
rounds=4
[ -z "$long" ] || rounds=60
fsd_test --timeout "${TIMEOUT:-3600}" --env ROUNDS="${ROUNDS:-$rounds}"
echo "$(grep -c 'answered that ran before' "$work/daemon.log" || true) requests were answered that ran before a kill"
