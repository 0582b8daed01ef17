#!/bin/bash
. /share/guest-lib.sh
. /share/nvme-lib.sh

# This kernel takes the controllers of two hosts for two paths to one disk, so each is told by itself what to do.
nqn=$(host nqn disk)
connect "$nqn"
by_hand "$nqn" nqn.2014-08.org.nvmexpress:uuid:22222222-2222-2222-2222-222222222222 22222222-2222-2222-2222-222222222222
wait_for '[ "$(controllers_of "$nqn" | wc -l)" = 2 ] && disk_of "$nqn" >/dev/null' || fail "there are not two controllers"
a=/dev/$(controllers_of "$nqn" | head -n 1)
b=/dev/$(controllers_of "$nqn" | tail -n 1)

dd if=/dev/urandom of=/tmp/block bs=4096 count=1 status=none
put() {
    nvme io-passthru "$1" --opcode=1 --namespace-id=1 --cdw12=7 --data-len=4096 --input-file=/tmp/block --write >/tmp/said 2>&1
}
get() {
    nvme io-passthru "$1" --opcode=2 --namespace-id=1 --cdw12=7 --data-len=4096 --read >/tmp/said 2>&1
}
kept_out() {
    if put "$1"; then fail "$1 could write"; fi
    grep -qi "reservation conflict" /tmp/said || { cat /tmp/said; fail "$1 was kept out by something else"; }
}

put "$a" && put "$b" || { cat /tmp/said; fail "nothing is reserved yet"; }
nvme resv-register "$a" -n 1 --nrkey=11 --rrega=0 --cptpl=3
nvme resv-acquire "$a" -n 1 --crkey=11 --rtype=1 --racqa=0
nvme resv-report "$a" -n 1 --eds --numd=127 >/tmp/report || { cat /tmp/report; fail "no report"; }
grep -q 'rtype *: *1' /tmp/report || { cat /tmp/report; fail "not reserved"; }
put "$a" || { cat /tmp/said; fail "the holder cannot write"; }
get "$b" || { cat /tmp/said; fail "the other cannot read"; }
kept_out "$b"
say "the other host is kept out"

host restart
wait_for 'put "$a" && get "$b"' || { cat /tmp/said; fail "the hosts do not come back"; }
kept_out "$b"
say "also after a restart"

nvme resv-register "$b" -n 1 --nrkey=22 --rrega=0
nvme resv-acquire "$b" -n 1 --crkey=22 --prkey=11 --rtype=1 --racqa=1
put "$b" || { cat /tmp/said; fail "the new holder cannot write"; }
kept_out "$a"
say "until it takes over"
nvme resv-release "$b" -n 1 --crkey=22 --rtype=1 --rrela=0
put "$a" && put "$b" || { cat /tmp/said; fail "nothing is reserved any more"; }
nvme disconnect -n "$nqn" >/dev/null
say "done"
