#!/usr/bin/env bash
# The bucket is away while the guest writes: writing goes on until the log is full, waits, and goes on. No error.
. "$(dirname "$0")/lib.sh"

seconds=${SECONDS_AWAY:-$([ -n "$long" ] && echo 120 || echo 25)}
# A real S3 server, which is stopped for the time.
port=${S3_PORT:-$((20000 + RANDOM % 10000))}
environment=$("$root/scripts/dev-s3" start --port "$port" --dir "$sockets/s3")
eval "$environment"
stop_s3() { resume_s3; "$root/scripts/dev-s3" stop --dir "$sockets/s3" >/dev/null 2>&1; }
gateway() { cat "$sockets/s3/run/rgw.pid"; }
resume_s3() { [ ! -s "$work/gateway" ] || kill -CONT "$(cat "$work/gateway")" 2>/dev/null || true; }
cleanups+=(stop_s3)
gateway >"$work/gateway"
[ -s "$work/gateway" ] || die "no S3 server"

host_away() { kill -STOP "$(cat "$work/gateway")"; }
host_back() { resume_s3; }
host_drain() { wait_drained; }
host_trouble() { stat_of disk store_trouble; }
host_paced() { stat_of disk paced_writes; }

start_daemon --store "s3://$BLOCKD_TEST_S3_BUCKET/outage-$$" --s3-endpoint "$BLOCKD_TEST_S3_ENDPOINT" --s3-timeout 2s --read-cache 0 --block-cache 1MiB --log-size 96MiB
ctl volume create disk --size 2GiB >/dev/null
guest --timeout "${TIMEOUT:-$((seconds * 6 + 240))}" --env AWAY="$seconds"
