# What the tests' parts in the guest share.

set -euo pipefail
mkdir -p /usr/local/bin
[ ! -e /share/blockd ] || cp /share/blockd /usr/local/bin/blockd
export BLOCKD_DATA=/nowhere

begun=$SECONDS
say() { echo "[$((SECONDS - begun)) s] $*"; }
fail() { echo "FAILED: $*"; exit 1; }
trap 'echo "FAILED in line $LINENO: $BASH_COMMAND"' ERR

# Asks the host for something, see lib.sh. Prints its answer.
host() {
    local line last=
    exec 3<>"/dev/tcp/10.0.2.2/$CONTROL"
    echo "$*" >&3
    while read -r line <&3; do
        [ -z "$last" ] || echo "$last"
        last=$line
    done
    exec 3>&-
    [ "$last" = "status 0" ] || fail "host $*: $last"
}

# "$@" must fail, and say something that matches the pattern $1.
refused() {
    local pattern=$1 said
    shift
    if said=$("$@" 2>&1); then fail "$* succeeded: $said"; fi
    [[ $said =~ $pattern ]] || fail "$* said: $said"
    say "refused as it should: $said"
}

# The kernel must not have seen a device fail.
no_io_errors() {
    if dmesg | grep -E 'I/O error|Buffer I/O|EXT4-fs error|XFS.*(shutdown|error)|BTRFS (error|critical)'; then
        fail "an I/O error reached the kernel"
    fi
}
