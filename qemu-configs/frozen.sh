#!/usr/bin/env bash
# frozen.sh [--timeout SECONDS] [--wait SECONDS] NAME -- COMMAND…: runs a command that copies a VM's memory (migrate, save, a snapshot)
# while the management device of VM NAME does no DMA. QEMU does not know what the device writes: a page that is written after it was copied
# is torn in the copy, and nothing says so.
#
#   frozen.sh web -- virsh save web /var/lib/libvirt/save/web
#   frozen.sh web -- virsh snapshot-create-as web before-upgrade
#   frozen.sh web -- virsh migrate --live web qemu+ssh://other/system
#   frozen.sh web -- qmp-job.py /run/web.qmp savevm before-upgrade disk0
#
# The VM is thawed when the copy has ended. That is not the end of the command: virsh can be gone while libvirt goes on. So a signal cancels
# the copy, and whatever happened to virsh, libvirt is asked until it has no job for the domain; qmp-job.py does the same with QEMU itself.
# A second signal changes nothing. Of any other COMMAND its end must be the copy's: it is sent TERM, and waited for (a script around virsh
# is none; run virsh itself, also after sudo, env, nice or timeout). Where the end of the copy cannot be established, the VM stays frozen.
# A command that has not ended when libvirt does not tell, or when the freeze is over, is left running, and keeps the lock.
#
# The VM must be this host's: a virsh that is connected to another host's libvirt is refused. Where virsh-frozen stands as virsh, sudo goes
# before frozen.sh: `frozen.sh web -- sudo virsh …` would freeze a second time there, and be refused, for sudo does not hand VMGMT_FROZEN on.
#
# One frozen.sh for a VM at a time: another one is refused, or waits for it with --wait. (What vmgmtctl freezes and thaws by hand meanwhile
# is not seen.) Ends with the command's status, or with 128 and the signal's number; 75: the command was not run (the VM does not become
# quiet, or the copy could not be watched), or the VM was not frozen to the end of the copy, or stays frozen: what was made is not to be used.
#
# VMGMTCTL names another vmgmtctl, VMGMT_CONTROL another control socket, VMGMT_LOCKS the folder that all who freeze share (the control
# socket's), VMGMT_PATIENCE for how many seconds libvirt is asked again when it does not say whether it has a job (30). A command that ends
# with 76 says that a copy goes on, or may.
set -u

ctl=${VMGMTCTL:-vmgmtctl}
# A frozen.sh that is killed outright leaves the VM frozen for no longer than this.
timeout_seconds=3600
wait_seconds=0
patience=${VMGMT_PATIENCE:-30}
while [ $# -gt 0 ]; do
    case $1 in
        --timeout) timeout_seconds=${2-} ;;
        --wait) wait_seconds=${2-} ;;
        *) break ;;
    esac
    shift $(($# > 1 ? 2 : 1))
done
if [ $# -lt 3 ] || [ "$2" != -- ] || [[ ! $timeout_seconds =~ ^[0-9]+$ || ! $wait_seconds =~ ^[0-9]+$ ]]; then
    sed -n '2,/^set -u/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
name=$1
shift 2

# Whoever reads what is said here may be gone: the thaw comes all the same. Not ignored, which the command would inherit.
piped=
trap 'piped=yes' PIPE
say() {
    echo "frozen.sh: $*" >&2
}
refuse() {
    say "$1; not run: ${command[*]}"
    exit 75
}
command=("$@")

# Whose copy it is: the command's own, libvirt's or QEMU's; and the words before and with which these are asked.
copier=own
ask=()
for place in "${!command[@]}"; do
    word=${command[place]}
    case ${word##*/} in
        virsh | virsh-frozen) copier=libvirt ;;
        qmp-job.py) copier=qemu ;;
        *) [ "$word" != "${VIRSH-}" ] || copier=libvirt ;;
    esac
    if [ "$copier" != own ]; then
        ask=("${command[@]:0:place + 1}")
        break
    fi
    # Only what runs another command can have one behind it.
    case ${command[0]##*/}/${word##*/} in
        # A signal ends it at once, while what it runs goes on.
        */systemd-inhibit) refuse "systemd-inhibit does not wait for the end of what it runs: run systemd-inhibit frozen.sh … instead" ;;
        sudo/* | doas/* | env/* | nice/* | ionice/* | timeout/* | nohup/* | setsid/* | stdbuf/* | python3/*) ;;
        *) break ;;
    esac
done
domain=$name
case $copier in
    libvirt)
        beside=$(dirname "$(readlink -f "$0")")
        # shellcheck source=qemu-configs/virsh-words.sh
        . "$beside/virsh-words.sh" || refuse "no virsh-words.sh in $beside: put it there, beside frozen.sh"
        virsh_words "${command[@]:${#ask[@]}}"
        if [ -n "$virsh_unclear" ]; then
            refuse "which domain virsh copies cannot be told: $virsh_unclear: $virsh_remedy"
        fi
        ask+=(${virsh_connect[@]+"${virsh_connect[@]}"})
        virsh_is_here "${ask[@]}" || refuse "$virsh_unclear: $virsh_remedy"
        if [ -n "$virsh_copies" ]; then
            domain=$("${ask[@]}" domname "$virsh_domain" </dev/null) && domain=${domain%%$'\n'*} && [ -n "$domain" ] ||
                refuse "virsh knows no domain $virsh_domain"
        fi
        ;;
    qemu) ask+=("${command[${#ask[@]}]-}") ;;
esac

# One at a time: the second one's thaw would be in the middle of the first one's copy, and the first one's thaw would not fail. The
# kernel takes the lock back when the last of our processes has ended.
if [ -n "${VMGMT_LOCKS-}" ]; then
    locks=$VMGMT_LOCKS
elif [ -n "${VMGMT_CONTROL-}" ]; then
    locks=$(dirname "$VMGMT_CONTROL")
elif [ "$(id -u)" != 0 ] && [ -n "${XDG_RUNTIME_DIR-}" ]; then
    locks=$XDG_RUNTIME_DIR/vmgmt
else
    locks=/run/vmgmt
fi
lock=$locks/frozen-${name//\//_}.lock
{ exec 9<>"$lock"; } 2>/dev/null || refuse "cannot open $lock: is vmgmtd running, and may this user write there? VMGMT_LOCKS names another folder (the same for all who freeze)"
if ! flock -n 9; then
    holder=$(head -n 1 "$lock")
    [ "$wait_seconds" != 0 ] || refuse "VM $name is being frozen by another frozen.sh (${holder:-it does not say which}): wait for it, or give --wait SECONDS"
    flock -w "$wait_seconds" 9 || refuse "VM $name is still being frozen by another frozen.sh after $wait_seconds s (${holder:-it does not say which})"
fi
: >"$lock"
echo "process $$ since $(date '+%F %T'): ${command[*]}" >&9

# Waits for a child's end, and ends as it did. (A trapped signal ends bash's wait, SIGPIPE too.)
await() {
    local status
    until
        piped=
        wait "$1"
        status=$?
        [ -z "$piped" ]
    do :; done
    return "$status"
}

# From a session of its own: sudo hands on no signal that comes from its own group of processes.
signal() {
    setsid --wait sh -c 'kill -"$1" "$2"' - "$1" "$2" 2>/dev/null
}

# Whether the freeze has timed out: nothing is held any more then.
over() {
    [ $((SECONDS - frozen_since)) -gt "$timeout_seconds" ]
}

# Whether libvirt copies: none, running, or unknown.
job() {
    local said
    if said=$(LC_ALL=C timeout -s KILL 10 "${ask[@]}" domjobinfo "$domain" </dev/null 2>/dev/null); then
        case $said in
            *"Job type:"*Bounded* | *"Job type:"*Unbounded*) echo running ;;
            *"Job type:"*) echo none ;;
            *) echo unknown ;;
        esac
    # Where no QEMU runs, none copies: a save ends the domain.
    elif said=$(timeout -s KILL 10 "${ask[@]}" list --name </dev/null 2>/dev/null) && [[ $'\n'$said$'\n' != *$'\n'"$domain"$'\n'* ]]; then
        echo none
    else
        echo unknown
    fi
}

# Asks libvirt until it has no job; fails where it does not tell. What virsh asked for last may begin just after virsh's end, so once is not enough.
no_job() {
    local none=0 unknown_since=$SECONDS told=
    while [ "$none" -lt 2 ]; do
        case $(job) in
            none) none=$((none + 1)) unknown_since=$SECONDS ;;
            running)
                none=0 unknown_since=$SECONDS
                [ -n "$told" ] || say "libvirt still copies $domain: VM $name stays frozen until it has ended"
                told=yes
                [ -z "$stopped" ] || timeout -s KILL 10 "${ask[@]}" domjobabort "$domain" </dev/null >/dev/null 2>&1
                ;;
            *)
                none=0
                [ $((SECONDS - unknown_since)) -lt "$patience" ] || return 1
                ;;
        esac
        ! over || return 1
        sleep 0.3
    done
}

# Has the command cancel its copy, and waits for its end. 76: the command is still there and its copy may go on, but the freeze is over, or
# libvirt does not tell. It is left alone then: it keeps the lock as long as it lives.
cancel() {
    local idle=0 unknown_since=$SECONDS state=
    # virsh itself asks libvirt to cancel; it may have begun nothing yet, or not hear this, so libvirt is asked too.
    if [ "$copier" = libvirt ]; then signal INT "$1"; else signal TERM "$1"; fi
    # (Not kill -0: it may be another user's.)
    while [ -n "$(jobs -pr)" ]; do
        ! over || return 76
        if [ "$copier" = libvirt ]; then
            state=$(job)
            case $state in
                none) idle=$((idle + 1)) ;;
                *) timeout -s KILL 10 "${ask[@]}" domjobabort "$domain" </dev/null >/dev/null 2>&1 ;;
            esac
            [ "$state" = unknown ] || unknown_since=$SECONDS
            [ "$state" != unknown ] || [ $((SECONDS - unknown_since)) -lt "$patience" ] || return 76
            # It waits for something else, a password or another host.
            [ "$idle" -lt 10 ] || signal TERM "$1"
        fi
        sleep 0.2
    done
    await "$1" 2>/dev/null
}

# After the command's end, with that status: whether its copy has ended too.
ended() {
    case $copier/$1 in
        # It was not run.
        */126 | */127) ;;
        */76) return 1 ;;
        libvirt/0) ;;
        libvirt/*) no_job ;;
        # It says 128 + INT, TERM or HUP only when the copy has ended. Killed otherwise it could see to nothing (124: timeout's own).
        qemu/129 | qemu/130 | qemu/143) ;;
        qemu/124 | qemu/12[89] | qemu/1[3-9]? | qemu/2??) timeout -s KILL "$timeout_seconds" "${ask[@]}" cancel </dev/null ;;
    esac
}

# Thaws, and ends with that status.
finish() {
    trap '' INT TERM HUP
    local thawed
    "$ctl" thaw "$name"
    thawed=$?
    case $thawed in
        0) exit "$1" ;;
        1 | 4)
            say "VM $name was not frozen to the end: do not use what was made (its time-out was over, then give more than --timeout $timeout_seconds; or somebody else thawed it)"
            ;;
        *)
            say "the daemon cannot be asked whether VM $name was frozen to the end (vmgmtctl thaw ended with $thawed): do not use what was made before it says so. \`vmgmtctl thaw $name\`, when it is there again: if that succeeds, the VM was frozen all the time"
            ;;
    esac
    exit 75
}

stays() {
    say "whether the copy of VM $name has ended cannot be established: the VM stays frozen, for $timeout_seconds s from its freeze on, and what was made is not to be used"
    case $copier in
        libvirt) say "when \`virsh domjobinfo $domain\` shows no job (\`virsh domjobabort $domain\` cancels it): vmgmtctl thaw $name" ;;
        qemu) say "when \`${ask[*]} cancel\` has succeeded (it cancels, and waits for the end): vmgmtctl thaw $name" ;;
        *) say "when it has: vmgmtctl thaw $name" ;;
    esac
    [ -z "$(jobs -pr)" ] || say "process $! (${command[*]}) still runs, and is left alone: until its end no other frozen.sh freezes VM $name"
    exit 75
}

step=before
stopped=
# $!, not what a variable says of it: a signal may come before it is set.
stop() {
    trap '' INT TERM HUP
    local status
    stopped=$1
    case $step in
        before) exit "$1" ;;
        # What was asked for may be there before its answer.
        freezing)
            signal TERM "${!-}"
            await "${!-}" 2>/dev/null
            "$ctl" thaw "$name" >/dev/null 2>&1
            exit "$1"
            ;;
        copying)
            say "cancels the copy, and waits for its end: VM $name stays frozen until then"
            cancel "${!-}"
            status=$?
            # An end in good order may hide behind 0: the command has its own.
            [ "$copier/$status" != libvirt/0 ] || status=1
            ended "$status" || stays
            ;;
    esac
    finish "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP

# In the background: a signal is heard at once.
frozen_since=$SECONDS
step=freezing
"$ctl" freeze "$name" --timeout "$timeout_seconds" &
await "$!"
status=$?
if [ "$status" != 0 ]; then
    say "VM $name cannot be frozen; not run: ${command[*]}"
    exit 75
fi
step=copying
# For a virsh that is virsh-frozen itself.
export VMGMT_FROZEN="${VMGMT_FROZEN-} $name"
# (Without this a command in the background has no standard input.)
"${command[@]}" <&0 &
await "$!"
status=$?
ended "$status" || stays
finish "$status"
