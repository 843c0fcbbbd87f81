#!/usr/bin/env bash
# Starts N VMs, each with one management device; ends them all with Ctrl-C.
#
#   many-vms.sh 4 --own '/run/vmgmt/vm%d.sock'      a socket per VM: the socket is the VM's identity
#   many-vms.sh 4 --shared /run/vmgmt/shared.sock   one socket for all
#
#   --logs FOLDER     where the consoles go, one file a VM (default: the current folder)
#   --dry-run         print the command lines and end
#   -- OPTIONS        passed to one-vm.sh for every VM
#
# The VMs are called vm1 … vmN.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "many-vms.sh: $*" >&2
    exit 2
}

[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || fail "the first word is the number of VMs, as in: many-vms.sh 4 --shared PATH"
count=$1
shift
own='' shared='' logs=. dry=no options=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --dry-run) dry=yes; shift; continue ;;
        --) shift; options=("$@"); break ;;
    esac
    [[ $# -ge 2 ]] || fail "$1 is unknown or wants a value"
    case $1 in
        --own) own=$2 ;;
        --shared) shared=$2 ;;
        --logs) logs=$2 ;;
        *) fail "$1 is unknown" ;;
    esac
    shift 2
done
[[ -n $own || -n $shared ]] || fail "say --own 'PATH with %d' or --shared PATH"
[[ -z $own || $own == *%d* ]] || fail "--own $own: it needs a %d for the VM's number"

pids=()
stop() {
    for pid in ${pids[@]+"${pids[@]}"}; do
        kill "$pid" 2>/dev/null || true
    done
}
trap stop EXIT

for ((number = 1; number <= count; number++)); do
    socket=${shared:-${own//%d/$number}}
    command=("$here/one-vm.sh" --name "vm$number" --socket "$socket" ${options[@]+"${options[@]}"})
    if [[ $dry == yes ]]; then
        "${command[@]}" --dry-run
    else
        "${command[@]}" --serial "file:$logs/vm$number.log" &
        pids+=($!)
    fi
done
wait
