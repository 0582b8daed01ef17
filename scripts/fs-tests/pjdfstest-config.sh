# The configuration of pjdfstest for every way to the filesystem; sourced, here and in the guest.
# shellcheck shell=bash

# pjdfstest_config NAPTIME EXPECTED [FEATURE...]: EXPECTED are lines of cases that may fail, FEATURE is what not every way has. REMOUNT in it is
# to be replaced by true or false.
pjdfstest_config() {
    local naptime=$1 expected=$2 feature
    shift 2
    echo "[features]"
    for feature in "$@" rename_ctime utime_now utimensat; do echo "$feature = {}"; done
    cat <<TOML

[settings]
naptime = $naptime
allow_remount = REMOUNT
expected_failures = [
$expected
]

[dummy_auth]
entries = [
    ["nobody", "nogroup"],
    ["daemon", "daemon"],
]
TOML
}
