#!/usr/bin/env bash
# frozen.sh [--timeout SECONDS] NAME -- COMMAND…: runs a command that copies a VM's memory (migrate, save, a snapshot) while the
# management device of VM NAME does no DMA. QEMU does not know what the device writes: a page that is written after it was copied is
# torn in the copy, and nothing says so.
#
#   frozen.sh web -- virsh save web /var/lib/libvirt/save/web
#   frozen.sh web -- virsh snapshot-create-as web before-upgrade
#   frozen.sh web -- virsh migrate --live web qemu+ssh://other/system
#   frozen.sh web -- qmp-job.py /run/web.qmp savevm before-upgrade disk0
#
# The VM is thawed however the command ends, also by a signal. Ends with the command's status; 75: the VM does not become quiet (the
# command was not run), or was thawed before the command had ended (what it made is not to be used).
# VMGMTCTL names another vmgmtctl, VMGMT_CONTROL another control socket.
set -u

ctl=${VMGMTCTL:-vmgmtctl}
# A hook that is killed outright leaves the VM frozen for no longer than this.
timeout_seconds=3600
if [ "${1-}" = --timeout ]; then
    timeout_seconds=${2-}
    shift 2
fi
if [ $# -lt 3 ] || [ "$2" != -- ]; then
    sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
name=$1
shift 2

child=
frozen=
finish() {
    status=$?
    trap - EXIT
    trap '' INT TERM HUP
    # A copy that goes on must not see DMA: first its end, then the thaw.
    if [ -n "$child" ] && kill -TERM "$child" 2>/dev/null; then
        wait "$child"
    fi
    case $frozen in
        yes)
            if ! "$ctl" thaw "$name"; then
                echo "frozen.sh: VM $name was not frozen to the end: do not use what was made (give more than --timeout $timeout_seconds)" >&2
                exit 75
            fi
            ;;
        perhaps) "$ctl" thaw "$name" >/dev/null 2>&1 ;;
    esac
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# In the background: a signal is heard at once. What was asked for may be there before its answer.
frozen=perhaps
"$ctl" freeze "$name" --timeout "$timeout_seconds" &
child=$!
wait "$child"
status=$?
child=
if [ "$status" != 0 ]; then
    echo "frozen.sh: VM $name cannot be frozen; not run: $*" >&2
    exit 75
fi
frozen=yes
# (Without this a command in the background has no standard input.)
"$@" <&0 &
child=$!
wait "$child"
status=$?
child=
exit "$status"
