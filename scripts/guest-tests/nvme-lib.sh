# What the guest's parts of the NVMe/TCP tests share.

modprobe nvme-tcp
[ -s /etc/nvme/hostnqn ] || { mkdir -p /etc/nvme; nvme gen-hostnqn >/etc/nvme/hostnqn; }
[ -s /etc/nvme/hostid ] || cat /proc/sys/kernel/random/uuid >/etc/nvme/hostid

# Waits until a condition holds.
wait_for() {
    local tries=0
    until eval "$1"; do
        tries=$((tries + 1))
        [ $tries -lt 300 ] || return 1
        sleep 0.1
    done
}
# Names of the controllers of a subsystem, oldest first.
controllers_of() {
    local path
    for path in /sys/class/nvme/nvme*; do
        [ ! -e "$path/subsysnqn" ] || [ "$(cat "$path/subsysnqn")" != "$1" ] || basename "$path"
    done | sort -V
}
# The first disk of a subsystem.
disk_of() {
    local path
    for _ in $(seq 300); do
        for path in /sys/class/nvme-subsystem/nvme-subsys*; do
            if [ -e "$path/subsysnqn" ] && [ "$(cat "$path/subsysnqn")" = "$1" ]; then
                for disk in "$path"/nvme*n*; do
                    disk=$(basename "$disk")
                    if [[ $disk =~ ^nvme[0-9]+n[0-9]+$ ]] && [ -b "/dev/$disk" ]; then
                        echo "/dev/$disk"
                        return
                    fi
                done
            fi
        done
        sleep 0.1
    done
    echo "no disk of $1 appears" >&2
    return 1
}
# Connects to a subsystem; more arguments go to nvme connect.
connect() {
    local nqn=$1
    shift
    nvme connect -t tcp -a 10.0.2.2 -s "$NVME_PORT" -n "$nqn" --ctrl-loss-tmo=-1 --reconnect-delay=1 "$@"
}
# Connects without nvme-cli: subsystem, host name, host identifier, another option.
by_hand() {
    echo "transport=tcp,traddr=10.0.2.2,trsvcid=$NVME_PORT,nqn=$1,hostnqn=$2,hostid=$3,ctrl_loss_tmo=-1,reconnect_delay=1${4:+,$4}" \
        >/dev/nvme-fabrics
}
